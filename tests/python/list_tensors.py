"""Prints a safetensors file's tensors as the safetensors library lists them, in the form of `weft show --json`."""

import hashlib
import json
import struct
import sys

from safetensors import deserialize

data = open(sys.argv[1], "rb").read()
(header,) = struct.unpack("<Q", data[:8])
start = 8 + header
tensors = []
for name, tensor in deserialize(data):
    size = len(tensor["data"])
    tensors.append((name, tensor["dtype"], list(tensor["shape"]), size))

# The library gives contents, not positions: they follow each other in the order of the header's offsets.
offsets = json.loads(data[8:start])
tensors.sort(key=lambda tensor: (offsets[tensor[0]]["data_offsets"][0], tensor[0]))
listed = []
for name, dtype, shape, size in tensors:
    listed.append({"name": name, "dtype": dtype, "shape": shape, "start": start, "end": start + size})
    start += size
assert start == len(data)
print(json.dumps({"tensors": listed, "sha256": hashlib.sha256(data).hexdigest()}))
