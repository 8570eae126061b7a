"""Writes the generated modules of `chat_memory._proto` from the proto file.

    python generate.py            write them
    python generate.py --check    exit with 1 if they are not what the proto gives

Needs `grpcio-tools` and `mypy-protobuf` in the versions of `requirements-dev.txt`. An old
`grpcio-tools` is pinned on purpose: generated code runs on its own and newer versions of grpcio and
protobuf, never on older ones.

The modules keep the proto's own file name in their descriptors, so an application that has stubs of
its own for the same proto can load both. Only the import between them is rewritten, to lie inside
`chat_memory`: no top-level package `chatmemory` is installed.
"""

from __future__ import annotations

import importlib.resources
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
PROTOS = HERE.parent.parent / "proto"
PROTO = "chatmemory/v1/chat_memory.proto"
TARGET = HERE / "src" / "chat_memory" / "_proto"
IMPORTS = {
    "from chatmemory.v1 import chat_memory_pb2": "from chat_memory._proto import chat_memory_pb2",
    "code in chatmemory/v1/": "code in chat_memory/_proto/",
}


def generate() -> dict[str, str]:
    """The generated files, by name."""
    plugins = pathlib.Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{PROTOS}",
            f"-I{importlib.resources.files('grpc_tools') / '_proto'}",
            f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            PROTO,
        ]
        subprocess.run(command, check=True)
        files = {}
        for path in sorted((pathlib.Path(out) / "chatmemory" / "v1").iterdir()):
            text = path.read_text(encoding="utf-8")
            for old, new in IMPORTS.items():
                text = text.replace(old, new)
            files[path.name] = text
        return files


def stale() -> list[str]:
    """The names of the files that are not what the proto gives."""
    files = generate()
    kept = {path.name: path for path in TARGET.glob("chat_memory_pb2*")}
    different = [
        name
        for name, text in files.items()
        if name not in kept or kept[name].read_text(encoding="utf-8") != text
    ]
    return different + [name for name in kept if name not in files]


def main() -> int:
    if "--check" in sys.argv[1:]:
        different = stale()
        for name in different:
            print(f"{TARGET / name} is older than the proto: run generate.py", file=sys.stderr)
        return 1 if different else 0
    for name, text in generate().items():
        (TARGET / name).write_text(text, encoding="utf-8")
        print(f"wrote {TARGET / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
