#!/usr/bin/env python3
"""Generate the message modules from the `.proto` files: Python for the host, Rust for the agent.

    tools/protogen.py            write src/kata/proto/*_pb.py, *_pb.pyi and agent/src/proto/*.rs
    tools/protogen.py --check    write nothing; exit 1 if a file on disk differs

Needs grpcio-tools (the protobuf compiler as a Python package). What is generated is committed, so only who
changes a `.proto` needs it. The Python modules are tables for `kata.proto.codec` with their types in a stub
beside them; the Rust ones are structs over `agent/src/proto/codec.rs`. What the generators cannot express
(oneofs with several members, groups, fixed-width integers) is an error here, never a wrong module.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src/kata/proto"
RUST = ROOT / "agent/src/proto"

MODULES: dict[str, list[str]] = {
    "agent": ["agent.proto"],
    "agentext": ["agentext.proto"],
    "bootstrap": ["bootstrap.proto"],
    "cgroups_v1": ["cgroups_v1.proto"],
    "cgroups_v2": ["cgroups_v2.proto"],
    "cri": ["cri.proto"],
    "csi": ["csi.proto"],
    "events": ["events.proto", "events_ttrpc.proto"],
    "google": [
        "google/protobuf/any.proto",
        "google/protobuf/empty.proto",
        "google/protobuf/timestamp.proto",
        "status.proto",
    ],
    "health": ["health.proto"],
    "oci": ["oci.proto"],
    "runtimeoptions": ["runtimeoptions.proto"],
    "podsandbox": ["podsandbox.proto"],
    "sandbox": ["sandbox.proto"],
    "task": ["task.proto", "containerd_types.proto", "containerd_task_types.proto"],
    "ttrpc": ["ttrpc.proto"],
    "types": ["types.proto"],
}
"""Which files go into which generated module."""
RUST_MODULES = ["agent", "agentext", "csi", "google", "health", "oci", "ttrpc", "types"]
GOOGLE_DOCS = {
    "Any": "A message of any type: its type URL and its encoding.",
    "Empty": "Nothing.",
    "Timestamp": "Seconds since the Epoch and the nanoseconds beyond them.",
}
"""For the files that the compiler brings along."""

F = descriptor_pb2.FieldDescriptorProto
SCALARS = {
    F.TYPE_STRING: "string",
    F.TYPE_BYTES: "bytes",
    F.TYPE_BOOL: "bool",
    F.TYPE_INT32: "int32",
    F.TYPE_INT64: "int64",
    F.TYPE_UINT32: "uint32",
    F.TYPE_UINT64: "uint64",
    F.TYPE_ENUM: "enum",
    F.TYPE_DOUBLE: "double",
    F.TYPE_FLOAT: "float",
}
PYTHON_TYPES = {"string": "str", "bytes": "bytes", "bool": "bool", "double": "float", "float": "float"}
RUST_TYPES = {
    "string": "String",
    "bytes": "Vec<u8>",
    "bool": "bool",
    "int32": "i32",
    "int64": "i64",
    "uint32": "u32",
    "uint64": "u64",
    "enum": "i32",
}
# Messages whose name is taken in Rust.
RUST_NAMES = {"Box": "ConsoleBox"}
RUST_KEYWORDS = {"box", "final", "impl", "in", "loop", "match", "mod", "move", "ref", "self", "type", "use"}
RESERVED = {"encode", "decode", "to_dict", "from_dict", "FULL_NAME"}


class Unsupported(SystemExit):
    """The definition uses something that this generator does not know."""


@dataclass
class FieldDef:
    """One field; `kind` is a scalar's name, or "" when `message` names a (module, class)."""

    name: str
    number: int
    label: str
    kind: str
    message: tuple[str, str] | None
    map_key: str
    doc: str


@dataclass
class MessageDef:
    """One message with its package."""

    name: str
    package: str
    doc: str
    fields: list[FieldDef] = field(default_factory=list)


@dataclass
class EnumDef:
    """One enum; nested ones are named Outer_Inner."""

    name: str
    doc: str
    values: list[tuple[str, int]]


@dataclass
class ServiceDef:
    """One service: method, request and response (module, class), comment; names of its streaming methods, for
    which nothing is generated but their names in Rust.
    """

    name: str
    doc: str
    methods: list[tuple[str, tuple[str, str], tuple[str, str]]]
    streams: list[tuple[str, tuple[str, str]]]


@dataclass
class Module:
    """Everything that one generated file holds."""

    name: str
    files: list[str]
    messages: list[MessageDef] = field(default_factory=list)
    enums: list[EnumDef] = field(default_factory=list)
    services: list[ServiceDef] = field(default_factory=list)


# ---- from the .proto files to the lists above ----


def compile_protos() -> descriptor_pb2.FileDescriptorSet:
    """The descriptors of all `.proto` files and of what they import, with comments."""
    import grpc_tools  # type: ignore[import-untyped]
    from grpc_tools import protoc

    names = sorted(path.name for path in SOURCES.glob("*.proto"))
    known = {name for files in MODULES.values() for name in files}
    if missing := set(names) - known:
        raise SystemExit(f"protogen: no module for {', '.join(sorted(missing))}: add it to MODULES")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "all.pb"
        arguments = [
            "protoc",
            f"-I{SOURCES}",
            f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
            "--include_imports",
            "--include_source_info",
            f"--descriptor_set_out={out}",
            *names,
        ]
        if protoc.main(arguments) != 0:
            raise SystemExit("protogen: the protobuf compiler found errors")
        return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())


def load(descriptors: descriptor_pb2.FileDescriptorSet) -> list[Module]:
    """The modules to generate."""
    files = {item.name: item for item in descriptors.file}
    where: dict[str, tuple[str, str]] = {}
    for module, names in MODULES.items():
        for name in names:
            for message in files[name].message_type:
                where[f".{files[name].package}.{message.name}"] = (module, message.name)
    modules = []
    for module, names in MODULES.items():
        made = Module(module, names)
        for name in names:
            _load_file(made, files[name], where)
        seen = [item.name for item in made.messages] + [item.name for item in made.enums]
        if doubled := {name for name in seen if seen.count(name) > 1}:
            raise Unsupported(f"protogen: {module}: {doubled} defined twice")
        modules.append(made)
    return modules


def _load_file(  # noqa: C901
    module: Module, file: descriptor_pb2.FileDescriptorProto, where: dict[str, tuple[str, str]]
) -> None:
    ours = not file.name.startswith("google/")
    docs = {}
    for location in file.source_code_info.location:
        if ours and location.leading_comments:
            docs[tuple(location.path)] = " ".join(location.leading_comments.split())
    for i, service in enumerate(file.service):
        methods, streams = [], []
        for method in service.method:
            if method.client_streaming != method.server_streaming:
                raise Unsupported(f"protogen: {service.name}.{method.name} streams in one direction only")
            if method.client_streaming:
                streams.append((method.name, where[method.input_type]))
                continue
            methods.append((method.name, where[method.input_type], where[method.output_type]))
        module.services.append(
            ServiceDef(f"{file.package}.{service.name}", docs.get((6, i), ""), methods, streams)
        )
    for i, enum in enumerate(file.enum_type):
        values = [(value.name, value.number) for value in enum.value]
        module.enums.append(EnumDef(enum.name, docs.get((5, i), ""), values))
    for i, message in enumerate(file.message_type):
        doc = docs.get((4, i), "") if ours else GOOGLE_DOCS[message.name]
        made = MessageDef(message.name, file.package, doc)
        maps = {}
        for nested in message.nested_type:
            if not nested.options.map_entry:
                raise Unsupported(f"protogen: {message.name}.{nested.name} is a nested message")
            maps[f".{file.package}.{message.name}.{nested.name}"] = nested
        for nested_enum in message.enum_type:
            values = [(value.name, value.number) for value in nested_enum.value]
            module.enums.append(EnumDef(f"{message.name}_{nested_enum.name}", "", values))
        for j, item in enumerate(message.field):
            made.fields.append(_load_field(message, item, maps, where, docs.get((4, i, 2, j), "")))
        module.messages.append(made)


def _load_field(
    message: descriptor_pb2.DescriptorProto,
    item: F,
    maps: dict[str, descriptor_pb2.DescriptorProto],
    where: dict[str, tuple[str, str]],
    doc: str,
) -> FieldDef:
    if item.name in RESERVED:
        raise Unsupported(f"protogen: {message.name}.{item.name} would hide a method of Message")
    label, key = "", ""
    if item.type_name in maps:
        entry = maps[item.type_name]
        label, key, item_type, type_name = "%", SCALARS[entry.field[0].type], entry.field[1].type, ""
        type_name = entry.field[1].type_name
    else:
        item_type, type_name = item.type, item.type_name
        if item.label == F.LABEL_REPEATED:
            label = "*"
        elif item.HasField("oneof_index"):
            # A oneof with one member is an optional field; that is how proto3's `optional` is written, too.
            if (
                sum(
                    other.HasField("oneof_index") and other.oneof_index == item.oneof_index
                    for other in message.field
                )
                > 1
            ):
                raise Unsupported(f"protogen: {message.name}.{item.name} is in a oneof with others")
            label = "?"
    if item_type == F.TYPE_MESSAGE:
        label = "" if label == "?" else label
        return FieldDef(item.name, item.number, label, "", where[type_name], key, doc)
    if item_type not in SCALARS:
        raise Unsupported(f"protogen: {message.name}.{item.name} has a type that the codecs do not know")
    return FieldDef(item.name, item.number, label, SCALARS[item_type], None, key, doc)


def _source_note(comment: str, module: Module) -> list[str]:
    note = f"Generated by tools/protogen.py from {', '.join(module.files)}: do not edit."
    return [f"{comment} {line}" for line in textwrap.wrap(note, 100)]


# ---- Python ----


def python_table(module: Module) -> str:
    """The module with the tables, without types."""
    lines = [
        *_source_note("#", module),
        f'"""Messages of {module.files[0]}; their types are in the stub beside this file."""',
        "",
        f"from kata.proto.codec import {'Methods, ' if module.services else ''}lazy_module",
        "",
    ]
    packages = {message.package for message in module.messages}
    main = next(message.package for message in module.messages)
    lines += ["_PACKAGE = {", f'    "": "{main}",']
    if len(packages) > 1:
        for message in module.messages:
            if message.package != main:
                lines.append(f'    "{message.name}": "{message.package}",')
    lines += ["}", "_MESSAGES = {"]
    for message in module.messages:
        parts = []
        for item in message.fields:
            kind = f"@{item.message[0]}.{item.message[1]}" if item.message else item.kind
            key = f"{item.map_key}:" if item.map_key else ""
            parts.append(f"{item.name}:{item.number}:{item.label}{key}{kind}")
        lines.append(f'    "{message.name}": "{" ".join(parts)}",')
    lines += ["}", "_ENUMS: dict[str, str] = {"]
    for enum in module.enums:
        lines.append(f'    "{enum.name}": "{" ".join(f"{name}={number}" for name, number in enum.values)}",')
    lines.append("}")
    if lines[-2] == "_ENUMS: dict[str, str] = {":
        lines[-2:] = ["_ENUMS: dict[str, str] = {}"]
    if module.services:
        lines.append("SERVICES = {")
        for service in module.services:
            if not service.methods:
                continue
            lines += [f'    "{service.name}": Methods(', "        {"]
            for name, request, response in service.methods:
                types = f"@{request[0]}.{request[1]} @{response[0]}.{response[1]}"
                lines.append(f'            "{name}": "{types}",')
            lines += ["        }", "    ),"]
        lines.append("}")
    lines += ["", "__getattr__, __dir__ = lazy_module(globals(), _PACKAGE, _MESSAGES, _ENUMS)"]
    return "\n".join(lines) + "\n"


def _python_type(module: Module, item: FieldDef, taken: set[str]) -> tuple[str, str]:
    """Annotation of the attribute and of the constructor's argument."""
    if item.message:
        where, name = item.message
        if where != module.name:
            name = f"{where}_pb.{name}"
        elif name in taken:
            # Inside the class this name is the field.
            name = f"_{name}"
    else:
        name = PYTHON_TYPES.get(item.kind, "int")
    if item.label == "*":
        return f"list[{name}]", f"list[{name}]"
    if item.label == "%":
        key = PYTHON_TYPES.get(item.map_key, "int")
        return f"dict[{key}, {name}]", f"dict[{key}, {name}]"
    if item.label == "?" or item.message:
        return f"{name} | None", f"{name} | None"
    return name, name


def _python_doc(text: str) -> list[str]:
    return textwrap.wrap(f'"""{text}"""', 105, initial_indent="    ", subsequent_indent="    ")


def python_stub(module: Module) -> str:
    """The module's types."""
    others = sorted(
        {item.message[0] for message in module.messages for item in message.fields if item.message}
        - {module.name}
    )
    lines = _source_note("#", module)
    if module.services or module.enums:
        lines += ["from typing import Final", ""]
    lines += [f"from kata.proto import {', '.join(f'{name}_pb' for name in others)}"] if others else []
    lines += [f"from kata.proto.codec import Message{', Methods' if module.services else ''}", ""]
    if module.services:
        lines += ["SERVICES: Final[dict[str, Methods]]", ""]
    aliases: set[str] = set()
    body: list[str] = []
    for enum in module.enums:
        body.append(f"class {enum.name}:")
        if enum.doc:
            body += _python_doc(enum.doc)
        body += [f"    {name}: Final = {number}" for name, number in enum.values]
        body.append("")
    for message in module.messages:
        body.append(f"class {message.name}(Message):")
        if message.doc:
            body += _python_doc(message.doc)
        taken = {item.name for item in message.fields}
        arguments = []
        for item in message.fields:
            attribute, argument = _python_type(module, item, taken)
            aliases |= {name[1:] for name in re.findall(r"\b_[A-Za-z]\w*", attribute)}
            body.append(f"    {item.name}: {attribute}")
            if item.doc:
                body += _python_doc(item.doc)
            arguments.append(f"        {item.name}: {argument} = ...,")
        if arguments:
            body += ["    def __init__(", "        self,", "        *,", *arguments, "    ) -> None: ..."]
        else:
            body.append("    def __init__(self) -> None: ...")
        body.append("")
    body += [f"_{name} = {name}" for name in sorted(aliases)]
    return "\n".join(lines + body).rstrip("\n") + "\n"


# ---- Rust ----


def snake(name: str) -> str:
    """The Rust spelling of a field name; a trailing underscore keeps it from being a keyword."""
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    name = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    return f"{name}_" if name in RUST_KEYWORDS else name


def _rust_path(module: Module, reference: tuple[str, str]) -> str:
    where, name = reference
    name = RUST_NAMES.get(name, name)
    return name if where == module.name else f"super::{where}::{name}"


def rust_type(module: Module, item: FieldDef) -> str:
    """The type of a struct's field."""
    name = _rust_path(module, item.message) if item.message else RUST_TYPES[item.kind]
    if item.label == "*":
        return f"Vec<{name}>"
    if item.label == "%":
        return f"BTreeMap<{RUST_TYPES[item.map_key]}, {name}>"
    if item.message:
        return f"Option<Box<{name}>>"
    return f"Option<{name}>" if item.label == "?" else name


def _rust_methods(item: FieldDef) -> tuple[str, str]:
    """The lines that encode and decode one field."""
    name = f"self.{snake(item.name)}"
    kind = item.kind or "message"
    if item.label == "%":
        return (
            f"codec::put_map_{item.map_key}_{kind}(out, {item.number}, &{name});",
            f"codec::get_map_{item.map_key}_{kind}(field, &mut {name})?",
        )
    prefix = {"*": "repeated_", "?": "optional_", "": ""}[item.label]
    borrow = "" if prefix != "repeated_" and kind not in ("string", "bytes", "message") else "&"
    if prefix == "optional_":
        borrow = "&"
    return (
        f"codec::put_{prefix}{kind}(out, {item.number}, {borrow}{name});",
        f"codec::get_{prefix}{kind}(field, &mut {name})?",
    )


def _rust_doc(text: str, indent: str = "") -> list[str]:
    return [f"{indent}/// {line}" for line in textwrap.wrap(text, 110 - len(indent))]


def rust(module: Module) -> str:
    """The module as Rust, formatted like rustfmt does with the agent's settings."""
    names = "self, " if any(message.fields for message in module.messages) else ""
    lines = [
        *_source_note("//", module),
        "",
        f"use super::codec::{{{names}DecodeError, Field, Message}};",
        # The agent has no std: its prelude stands in (agent/src/lib.rs).
        "use crate::prelude::standard::*;",
        "",
    ]
    for service in module.services:
        constant = snake(service.name.rsplit(".", 1)[1]).upper()
        lines += _rust_doc(service.doc or "Name of the service.")
        lines.append(f'pub const {constant}: &str = "{service.name}";')
        lines.append("/// Its methods.")
        methods = [
            f'"{name}"'
            for name in [*(name for name, _, _ in service.methods), *(name for name, _ in service.streams)]
        ]
        one = f"pub const {constant}_METHODS: &[&str] = &[{', '.join(methods)}];"
        head, _, list_of_them = one.partition(" = ")
        if len(one) <= 120:
            lines.append(one)
        elif len(list_of_them) + 4 <= 120:  # as rustfmt breaks it
            lines += [f"{head} =", f"    {list_of_them}"]
        else:
            lines += [f"pub const {constant}_METHODS: &[&str] = &["]
            lines += [f"    {name}," for name in methods] + ["];"]
        lines.append("")
    for enum in module.enums:
        for name, number in enum.values:
            constant = f"{snake(enum.name).replace('__', '_')}_{snake(name)}".upper()
            lines.append(f"pub const {constant}: i32 = {number};")
        lines.append("")
    for message in module.messages:
        lines += _rust_message(module, message)
    return "\n".join(lines).rstrip("\n") + "\n"


def _rust_message(module: Module, message: MessageDef) -> list[str]:
    rust_name = RUST_NAMES.get(message.name, message.name)
    lines = _rust_doc(message.doc)
    lines.append("#[derive(Default, Debug, Clone, PartialEq)]")
    if not message.fields:
        lines += [f"pub struct {rust_name} {{}}", ""]
        lines += [f"impl Message for {rust_name} {{", "    fn encode(&self, _out: &mut Vec<u8>) {}", ""]
        lines += ["    fn merge(&mut self, _field: Field<'_>) -> Result<(), DecodeError> {"]
        lines += ["        Ok(())", "    }", "}", ""]
        return lines
    lines.append(f"pub struct {rust_name} {{")
    for item in message.fields:
        lines += _rust_doc(item.doc, "    ")
        lines.append(f"    pub {snake(item.name)}: {rust_type(module, item)},")
    lines += ["}", "", f"impl Message for {rust_name} {{", "    fn encode(&self, out: &mut Vec<u8>) {"]
    by_number = sorted(message.fields, key=lambda item: item.number)
    lines += [f"        {_rust_methods(item)[0]}" for item in by_number]
    lines += ["    }", "", "    fn merge(&mut self, field: Field<'_>) -> Result<(), DecodeError> {"]
    lines.append("        match field.number {")
    for item in message.fields:
        lines.append(f"            {item.number} => {_rust_methods(item)[1]},")
    lines += ["            _ => {}", "        }", "        Ok(())", "    }", "}", ""]
    return lines


# ---- names of fields, for the agent's policy ----

SCHEMA_KINDS = {
    "string": "s",
    "bytes": "y",
    "bool": "b",
    "int32": "i",
    "int64": "i",
    "enum": "i",
    "uint32": "u",
    "uint64": "u",
}
SCHEMA_MODULES = ["agent", "agentext"]


def schema(modules: list[Module]) -> str:
    """The requests of the agent's services with the names of their fields, as Rust tables."""
    known = {(module.name, message.name): message for module in modules for message in module.messages}
    methods: dict[str, str] = {}
    wanted: list[tuple[str, str]] = []
    for module in modules:
        for service in module.services if module.name in SCHEMA_MODULES else []:
            requests = [(name, request) for name, request, _response in service.methods]
            for name, request in [*requests, *service.streams]:
                methods[name if service.name == "grpc.AgentService" else f"{service.name}/{name}"] = request[
                    1
                ]
                wanted.append(request)
    tables: dict[str, str] = {}
    origin: dict[str, tuple[str, str]] = {}
    while wanted:
        reference = wanted.pop()
        if origin.setdefault(reference[1], reference) != reference:
            raise Unsupported(f"protogen: two messages are called {reference[1]}")
        if reference[1] in tables:
            continue
        fields = []
        for item in known[reference].fields:
            kind = f"m{item.message[1]}" if item.message else SCHEMA_KINDS[item.kind]
            if item.label == "%":
                entry = f"map-{item.map_key}-{kind}"
                tables[entry] = f"key:1{SCHEMA_KINDS[item.map_key]} value:2{kind}"
                kind = f"m{entry}"
            fields.append(f"{item.name}:{item.number}{'*' if item.label in ('*', '%') else ''}{kind}")
            if item.message:
                wanted.append(item.message)
        tables[reference[1]] = " ".join(fields)
    lines = [
        f"// Generated by tools/protogen.py from {', '.join(f'{name}.proto' for name in SCHEMA_MODULES)}: do not edit.",
        "",
        "/// Methods as policies name them, and the message of their request.",
        "#[rustfmt::skip]",
        "pub const METHODS: &[(&str, &str)] = &[",
        *(f'    ("{name}", "{request}"),' for name, request in sorted(methods.items())),
        "];",
        "",
        "/// Messages and their fields: `name:number`, `*` if repeated, and the type: s(tring), (b)y(tes), b(ool),",
        "/// i(nteger), u(nsigned), m and the name of a message.",
        "#[rustfmt::skip]",
        "pub const MESSAGES: &[(&str, &str)] = &[",
        *(f'    ("{name}", "{fields}"),' for name, fields in sorted(tables.items())),
        "];",
    ]
    return "\n".join(lines) + "\n"


# ---- writing ----


def outputs(modules: list[Module]) -> dict[Path, str]:
    """Every generated file with its content."""
    made: dict[Path, str] = {}
    for module in modules:
        made[SOURCES / f"{module.name}_pb.py"] = python_table(module)
        made[SOURCES / f"{module.name}_pb.pyi"] = python_stub(module)
        if module.name in RUST_MODULES:
            made[RUST / f"{module.name}.rs"] = rust(module)
    made[RUST / "schema.rs"] = schema(modules)
    return made


def main() -> int:
    """Write or check; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    stale = []
    for path, text in outputs(load(compile_protos())).items():
        if path.exists() and path.read_text() == text:
            continue
        if arguments.check:
            stale.append(str(path.relative_to(ROOT)))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if stale:
        print(f"protogen: not up to date, run tools/protogen.py: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
