"""Fetches a model through the gRPC API of a running Weft node, and lists its tensors.

    pip install grpcio grpcio-tools grpcio-status
    python get_model.py HOME NAME FOLDER

HOME is the node's home, which `weft status` prints. NAME is a model's name, id or ticket. The files go to FOLDER.
"""

import os
import sys
import tempfile

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from grpc_tools import protoc


def load_api():
    """Generates the client from the schema of Weft, and loads it. A real project would generate it once."""
    schema = os.path.join(os.path.dirname(__file__), "..", "..", "proto", "schema")
    out = tempfile.mkdtemp()
    arguments = ["protoc", f"-I{schema}", f"--python_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(arguments + ["weft/api/v1/api.proto"]) != 0:
        sys.exit("cannot compile the schema")
    sys.path.insert(0, out)
    from weft.api.v1 import api_pb2, api_pb2_grpc

    return api_pb2, api_pb2_grpc


def main():
    home, name, folder = sys.argv[1:]
    api, services = load_api()
    # Only the owner can use the socket. To use TCP instead, connect to the address in `api/address` and send the
    # metadata
    # ("authorization", "Bearer " + the token in `api/token`) with every call.
    socket = f"unix:{os.path.realpath(home)}/api/weft.sock"
    # By default, grpcio uses the socket's path as the host name, in a form that other HTTP/2 servers refuse.
    channel = grpc.insecure_channel(socket, options=[("grpc.default_authority", "localhost")])

    status = services.NodeStub(channel).Status(api.StatusRequest())
    print(f"node {status.peer_id} with {status.peer_count} peers")

    models = services.ModelsStub(channel)
    request = api.GetRequest(target=name, to=os.path.abspath(folder))
    try:
        for event in models.Get(request):
            if event.HasField("progress"):
                progress = event.progress
                print(f"{progress.phase}: {progress.bytes_done} of {progress.bytes_total} bytes")
            else:
                print(f"done: {event.done.bytes_moved} bytes moved into {event.done.folder}")
    except grpc.RpcError as error:
        info = error_details_pb2.ErrorInfo()
        for detail in rpc_status.from_call(error).details:
            detail.Unpack(info)
        sys.exit(f"{info.reason}: {error.details()}")

    shown = models.Show(api.ShowRequest(model=event.done.model.id))
    for file in shown.files:
        for tensor in file.tensors:
            print(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}")


if __name__ == "__main__":
    main()
