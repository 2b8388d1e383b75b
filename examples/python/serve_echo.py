"""Offers the service of examples/schema/echo.proto to other machines, through a running Weft node.

    pip install grpcio grpcio-tools
    python serve_echo.py HOME

HOME is the node's home, which `weft status` prints. On another node, `weft call example.echo.v1.Echo Say
--data '{"text": "hello"}'` finds a peer that offers the service and calls it; `weft call PEER ...` calls one peer.
"""

import os
import queue
import sys
import tempfile

import grpc
from grpc_tools import protoc

HERE = os.path.dirname(os.path.abspath(__file__))


def load():
    """Generates the client and the descriptors from the schemas, and loads them. A real project would do this once."""
    out = tempfile.mkdtemp()
    schemas = os.path.join(out, "schemas.bin")
    for include, files, arguments in [
        (os.path.join(HERE, "..", "..", "proto", "schema"), ["weft/api/v1/api.proto"], [f"--grpc_python_out={out}"]),
        (os.path.join(HERE, "..", "schema"), ["echo.proto"], [f"--descriptor_set_out={schemas}"]),
    ]:
        if protoc.main(["protoc", f"-I{include}", f"--python_out={out}"] + arguments + files) != 0:
            sys.exit("cannot compile a schema")
    sys.path.insert(0, out)
    import echo_pb2
    from weft.api.v1 import api_pb2, api_pb2_grpc

    with open(schemas, "rb") as file:
        return api_pb2, api_pb2_grpc, echo_pb2, file.read()


def main():
    api, services, echo, schemas = load()
    socket = f"unix:{os.path.realpath(sys.argv[1])}/api/weft.sock"
    channel = grpc.insecure_channel(socket, options=[("grpc.default_authority", "localhost")])

    # Messages to the node, in the order of the queue.
    out = queue.SimpleQueue()
    out.put(api.ServeRequest(begin=api.ServeBegin(services=["example.echo.v1.Echo"], schemas=schemas)))
    for event in services.CallsStub(channel).Serve(iter(out.get, None)):
        what = event.WhichOneof("what")
        if what == "ready":
            print("ready", flush=True)
        elif what == "begin":
            print(f"{event.begin.caller} calls {event.begin.method}", flush=True)
        elif what == "message":
            text = echo.Text.FromString(event.message.data)
            answer = api.CallMessage(data=text.SerializeToString(), attachments=event.message.attachments)
            out.put(api.ServeRequest(answer=api.ServeAnswer(call=event.call, message=answer)))
            out.put(api.ServeRequest(answer=api.ServeAnswer(call=event.call, end=api.CallEnd())))


if __name__ == "__main__":
    main()
