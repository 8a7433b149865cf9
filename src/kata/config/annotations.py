"""Pod annotations that change a machine's configuration, in the spellings of Kata's two runtimes.

``io.katacontainers.config.hypervisor.NAME`` changes that key of the hypervisor's table, if the host's
`enable_annotations` allows it: each member is a regular expression that has to match the whole of NAME. (Kata matches
anywhere, so that there ``kernel`` also allows ``kernel_params``.) The path of a host's file also has to match the
host's list of patterns. As in Kata, ``config.runtime.`` and ``config.agent.`` need no permission.

Any other annotation under the prefix is an error: otherwise a typing error would run a pod with a different
configuration than its author expects.
"""

from __future__ import annotations

from kata.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kata.config.files import Configuration

PREFIX = "io.katacontainers."
_CONFIG = f"{PREFIX}config."
_TRUE, _FALSE = ("1", "t", "T", "TRUE", "true", "True"), ("0", "f", "F", "FALSE", "false", "False")
"""The values that Go's ``strconv.ParseBool`` accepts."""

_OURS = frozenset({"pkg.oci.bundle_path", "pkg.oci.container_type"})
"""Annotations that are set for the agent, and are ignored when a client repeats them."""
_PASSED_ON = ("fs-opt.", "volume=")
"""Prefixes of annotations that belong to a mount and not to the configuration."""

_RENAMED = {
    "hypervisor.default_max_vcpus": "hypervisor.default_maxvcpus",
    "hypervisor.blk_logical_sector_size": "hypervisor.block_device_logical_sector_size",
    "hypervisor.blk_physical_sector_size": "hypervisor.block_device_physical_sector_size",
    "hypervisor.block_device_num_queues": "hypervisor.num_queues",
    "hypervisor.block_device_queue_size": "hypervisor.queue_size",
    "hypervisor.prefetch_files.list": "hypervisor.prefetch_list_path",
    "hypervisor.cc_init_data": "hypervisor.initdata",
    "enable_vcpus_pinning": "runtime.enable_vcpus_pinning",
}
"""Annotation (below ``config.``, or below the prefix) -> the key, if the file spells it differently."""

_REFUSED = {
    "config_path": "the host chooses the configuration file (ConfigPath, KATA_CONF_FILE)",
    "asset_hash_type": "files of the guest are not checked against hashes of a pod",
    "container.resource.swappiness": "the guest has no swap",
    "container.resource.swap_in_bytes": "the guest has no swap",
    **{
        f"config.hypervisor.{name}": "files of the guest are not checked against hashes of a pod"
        for name in (
            *("kernel_hash", "image_hash", "initrd_hash", "jailer_hash", "firmware_hash"),
            *("firmware_volume_hash", "hypervisor_hash", "path_hash", "asset_hash_type"),
        )
    },
}
"""Known annotations that are refused, with the reason: to ignore them would be to promise what does not happen."""

_NEVER = frozenset({"hypervisor.enable_annotations", "hypervisor.seccompsandbox", "hypervisor.accelerator"})
"""Keys that only the host may set; so are all lists of patterns (``valid_...``)."""

_WITHOUT_PERMISSION = frozenset(
    {
        *(f"agent.{name}" for name in ("kernel_modules", "enable_tracing", "container_pipe_size", "policy")),
        *(f"agent.{name}" for name in ("cdh_api_timeout", "cdh_api_timeout_ms")),
        *(f"runtime.{name}" for name in ("disable_guest_seccomp", "sandbox_cgroup_only", "enable_pprof")),
        *(f"runtime.{name}" for name in ("experimental", "internetworking_model", "disable_new_netns")),
        *(f"runtime.{name}" for name in ("vfio_mode", "create_container_timeout", "guest_selinux_label")),
        *(
            f"runtime.{name}"
            for name in ("experimental_force_guest_pull", "name", "hypervisor_name", "agent_name")
        ),
        *(f"runtime.{name}" for name in ("enable_vcpus_pinning", "sandbox_bind_mounts", "shared_mounts")),
        *(f"runtime.{name}" for name in ("rootfs_upper_layer", "rootfs_upper_layer_size")),  # our own
    }
)
"""Keys of other sections that pods may set: those for which one of Kata's two runtimes has an annotation."""

_PATTERNS = {
    "hypervisor.path": "hypervisor.valid_hypervisor_paths",
    "hypervisor.kernel": "hypervisor.valid_kernel_paths",
    "hypervisor.initrd": "hypervisor.valid_initrd_paths",
    "hypervisor.firmware": "hypervisor.valid_firmware_paths",
    "hypervisor.entropy_source": "hypervisor.valid_entropy_sources",
    "hypervisor.jailer_path": "hypervisor.valid_jailer_paths",
    "hypervisor.virtio_fs_daemon": "hypervisor.valid_virtio_fs_daemon_paths",
    "hypervisor.vhost_user_store_path": "hypervisor.valid_vhost_user_store_paths",
}
"""Key -> the host's list of patterns for values from annotations."""


def ours(annotations: Mapping[str, Any]) -> dict[str, str]:
    """The annotations that `apply` handles."""
    return {
        name: str(value)
        for name, value in annotations.items()
        if name.startswith(PREFIX)
        and (rest := name[len(PREFIX) :]) not in _OURS
        and not rest.startswith(_PASSED_ON)
    }


HYPERVISOR = f"{_CONFIG}runtime.hypervisor_name"
"""The annotation that chooses the hypervisor, and with it the table and the file that the others change."""


def load(named: str, annotations: Mapping[str, Any]) -> Configuration:
    """Load the host's configuration for a pod, and apply the pod's annotations.

    Args:
        named: The main file that the client names; may be empty.
        annotations: All annotations of the pod.

    Raises:
        ConfigError: See `kata.config.files.load` and `apply`.
    """
    from kata.config import files

    wanted = str(annotations.get(HYPERVISOR) or "")
    configuration = files.load(named, wanted, f"annotation {HYPERVISOR}" if wanted else "")
    apply(configuration, annotations)
    return configuration


def apply(configuration: Configuration, annotations: Mapping[str, Any]) -> None:
    """Apply a pod's annotations to a configuration that was loaded for them (`load`).

    Args:
        configuration: The host's configuration, which is changed.
        annotations: All annotations of the pod.

    Raises:
        ConfigError: An annotation is unknown, malformed, not allowed by the host, or refused here.
    """
    of_ours = ours(annotations)
    if not of_ours:
        return
    from kata.config import keys
    from kata.config.files import canonical, without_effect

    hypervisor = str(configuration.get("runtime.hypervisor_name", ""))
    changed: dict[str, Any] = {}
    for annotation, text in sorted(of_ours.items()):
        where = f"annotation {annotation}"
        name = _key_name(annotation)
        key = keys.find(name, hypervisor)
        if key is None or not _may_be_set(name):
            raise _unknown(annotation, sorted(filter(_may_be_set, keys.KEYS)))
        if key.section == "hypervisor":
            _require_permission(configuration, annotation, key.name)
        value = key.check(_value(key, text, where), where)
        if name in _PATTERNS:
            _require_pattern(configuration, annotation, str(value), _PATTERNS[name])
        if name == "hypervisor.kernel_params":
            # As in Kata, the pod's parameters are appended to the host's, which it cannot remove.
            value = " ".join(filter(None, (str(configuration.get(name, "")), value)))
        if annotation == HYPERVISOR:
            value = canonical(value)
        changed[name] = value
        configuration.set(name, value, where)
    configuration.notes += without_effect(changed, hypervisor)


def _may_be_set(name: str) -> bool:
    """Whether an annotation may set a key."""
    section, _, short = name.partition(".")
    if section == "hypervisor":
        return name not in _NEVER and not short.startswith("valid_")
    return name in _WITHOUT_PERMISSION


def _key_name(annotation: str) -> str:
    rest = annotation[len(PREFIX) :]
    if rest in _REFUSED:
        raise ConfigError(f"annotation {annotation} is refused: {_REFUSED[rest]}", "Take it out of the pod.")
    name = annotation[len(_CONFIG) :] if annotation.startswith(_CONFIG) else rest
    return _RENAMED.get(name, name)


def _unknown(annotation: str, known: list[str]) -> ConfigError:
    import difflib

    near = difflib.get_close_matches(annotation, [_CONFIG + name for name in known], 1)
    return ConfigError(
        f"annotation {annotation} is not known",
        f"did you mean {near[0]}?" if near else f"docs/configuration.md lists those under {PREFIX}",
    )


def _require_permission(configuration: Configuration, annotation: str, name: str) -> None:
    import re

    from kata.config import keys

    allowed = configuration.get("hypervisor.enable_annotations", list(keys.DEFAULT_ANNOTATIONS))
    spellings = {
        name,
        *(key.partition(".")[2] for key, value in _RENAMED.items() if value == f"hypervisor.{name}"),
    }
    for pattern in allowed:
        try:
            # Allowed under any of its names: the Go runtime's, the Rust runtime's, and the file's.
            if any(re.fullmatch(pattern, spelling) for spelling in spellings):
                return
        except re.error as error:
            raise ConfigError(
                f"{configuration.origin('hypervisor.enable_annotations')}: enable_annotations:"
                f" {pattern!r} is not a regular expression: {error}"
            ) from None
    raise ConfigError(
        f"annotation {annotation} is not allowed on this host: enable_annotations is {list(allowed)!r}"
        f" ({configuration.origin('hypervisor.enable_annotations')})",
        f'Its owner may add "{name}" to enable_annotations in [{_table(configuration)}] of the configuration'
        " file.",
    )


def _table(configuration: Configuration) -> str:
    from kata.config.files import DEFAULT

    return f"hypervisor.{configuration.get('runtime.hypervisor_name', '') or DEFAULT}"


def _require_pattern(configuration: Configuration, annotation: str, path: str, patterns: str) -> None:
    """Check a path of the host against the host's list of patterns, see glob(3): ``*`` does not match ``/``."""
    import os
    from fnmatch import fnmatchcase

    parts = os.path.normpath(path).split("/")
    for pattern in configuration.get(patterns, []):
        wanted = pattern.split("/")
        if len(wanted) == len(parts) and all(map(fnmatchcase, parts, wanted)):
            return
    short = patterns.partition(".")[2]
    raise ConfigError(
        f"annotation {annotation}: {path!r} matches no pattern of {short} ({configuration.origin(patterns)})",
        f"The host's owner may add a pattern to {short} in [{_table(configuration)}].",
    )


def _value(key: Any, text: str, where: str) -> Any:
    """Convert an annotation's text to the key's type. Invalid text is returned as it is, for `Key.check` to report."""
    from kata.config import keys

    if key.kind == keys.BOOL:
        return True if text in _TRUE else False if text in _FALSE else text
    if key.kind in (keys.INT, keys.NUMBER):
        for kind in (int, float) if key.kind == keys.NUMBER else (int,):
            try:
                return kind(text)
            except ValueError:
                continue
        return text
    if key.kind == keys.LIST:
        # Kata separates modules by semicolons, and arguments by blanks.
        return [part.strip() for part in text.split(";") if part.strip()]
    if key.kind == keys.TABLE:
        raise ConfigError(f"{where}: {key.spelt} cannot be set by an annotation")
    return text
