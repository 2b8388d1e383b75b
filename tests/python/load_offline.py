"""Loads a model from a cache with huggingface_hub, without network: load_offline.py CACHE REPO REVISION.

Prints the model's folder, and the SHA-256 hash of each file.
"""

import hashlib
import json
import os
import pathlib
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import huggingface_hub  # noqa: E402: it reads the environment once

cache, repo, revision = sys.argv[1:]
folder = huggingface_hub.snapshot_download(repo, revision=revision, cache_dir=cache)
files = {}
for path in sorted(pathlib.Path(folder).rglob("*")):
    if path.is_file():
        name = path.relative_to(folder).as_posix()
        one = huggingface_hub.hf_hub_download(repo, name, revision=revision, cache_dir=cache)
        files[name] = hashlib.sha256(pathlib.Path(one).read_bytes()).hexdigest()
seen = huggingface_hub.scan_cache_dir(cache)
print(json.dumps({
    "folder": folder,
    "files": files,
    "size": seen.size_on_disk,
    "warnings": [str(warning) for warning in seen.warnings],
}))
