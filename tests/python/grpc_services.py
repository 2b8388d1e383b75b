"""Checks the health, reflection and token of a node's gRPC API, as any gRPC client sees them.

Argument: the node's home.
"""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

home = os.path.realpath(sys.argv[1])


def read(name):
    with open(os.path.join(home, "api", name)) as file:
        return file.read().strip()


for name in ["token", "address", "weft.sock"]:
    mode = os.stat(os.path.join(home, "api")).st_mode & 0o777
    assert mode == 0o700, oct(mode)
assert os.stat(os.path.join(home, "api", "token")).st_mode & 0o777 == 0o600

# Over the socket: no token.
channel = grpc.insecure_channel(f"unix:{home}/api/weft.sock", options=[("grpc.default_authority", "localhost")])
health = health_pb2_grpc.HealthStub(channel)
for service in ["", "weft.api.v1.Node", "weft.api.v1.Models"]:
    answer = health.Check(health_pb2.HealthCheckRequest(service=service))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING, service
services = ProtoReflectionDescriptorDatabase(channel).get_services()
for service in ["Node", "Models", "Topics", "Records", "Calls"]:
    assert f"weft.api.v1.{service}" in services, services
for service in ["grpc.health.v1.Health"]:
    assert service in services, services
database = ProtoReflectionDescriptorDatabase(channel)
described = database.FindFileContainingSymbol("weft.api.v1.Models")
assert [m.name for s in described.service if s.name == "Models" for m in s.method] == [
    "Add",
    "AddHfCache",
    "Get",
    "Read",
    "List",
    "Search",
    "Providers",
    "Show",
    "Remove",
    "Tag",
    "Untag",
    "Tags",
    "Gc",
    "Storage",
    "ChangeQuota",
    "Verify",
]

# Over TCP: with the token, and not without.
assert read("address").startswith("127.0.0.1:")
channel = grpc.insecure_channel(read("address"))
health = health_pb2_grpc.HealthStub(channel)
request = health_pb2.HealthCheckRequest()
for metadata in [None, [("authorization", "Bearer " + "0" * 64)], [("authorization", read("token"))]]:
    try:
        health.Check(request, metadata=metadata)
        sys.exit(f"accepted with {metadata}")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.UNAUTHENTICATED, error
answer = health.Check(request, metadata=[("authorization", "Bearer " + read("token"))])
assert answer.status == health_pb2.HealthCheckResponse.SERVING
print("ok")
