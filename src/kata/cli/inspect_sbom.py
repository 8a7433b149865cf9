"""Lists of an image's packages and findings for other programs: CycloneDX, SPDX and SARIF.

Sources: CycloneDX 1.5 and SPDX 2.3 (JSON), SARIF 2.1.0 (OASIS), the package URL specification.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from urllib.parse import quote

from kata.cli import inspect_kinds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LEVELS = {
    inspect_kinds.HIGH: "error",
    inspect_kinds.MEDIUM: "warning",
    inspect_kinds.LOW: "note",
    inspect_kinds.NOTE: "note",
}
_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_SPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")


def package_url(package: dict[str, Any], system: dict[str, Any]) -> str:
    """A package's purl.

    Args:
        package: One of the report's.
        system: The report's ``system``, whose id is the namespace of the distribution's packages.
    """
    kind, name, version = package["kind"], package["name"], package["version"]
    qualifiers = []

    def coded(text: str, safe: str = "") -> str:
        return quote(text, safe=f"-._~{safe}", errors="replace")

    if kind in ("deb", "apk", "rpm"):
        default = {"deb": "debian", "apk": "alpine", "rpm": "redhat"}[kind]
        path = f"{coded((system['id'] or default).lower())}/{coded(name)}"
        if kind == "rpm" and ":" in version:
            epoch, _, version = version.partition(":")
            qualifiers.append(f"epoch={coded(epoch)}")
        if package["architecture"]:
            qualifiers.insert(0, f"arch={coded(package['architecture'])}")
        if system["id"] and system["version"]:
            qualifiers.append(f"distro={coded(system['id'] + '-' + system['version'])}")
        qualifiers.sort()
    elif kind == "maven":
        group, _, artifact = name.rpartition(":")
        path = f"{coded(group)}/{coded(artifact)}" if group else coded(artifact)
    elif kind == "pypi":
        path = coded(name.lower().replace("_", "-"))
    else:
        path = "/".join(coded(part) for part in name.split("/") if part)
    end = "?" + "&".join(qualifiers) if qualifiers else ""
    return f"pkg:{coded(kind)}/{path}@{coded(version)}{end}"


def _printable(text: str) -> str:
    """Text for a document: without what XML and others cannot have, be it escaped."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _identity(report: dict[str, Any]) -> uuid.UUID:
    image = report["image"]
    seed = f"{image['name']} {image['digest']} {report['tool']}".encode("utf-8", "replace")
    return uuid.uuid5(_SPACE, hashlib.sha256(seed).hexdigest())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _places(report: dict[str, Any]) -> list[tuple[dict[str, Any], str, list[str]]]:
    """Each package once: itself, its purl, and the files that record it."""
    found: dict[tuple[str, str, str, str], tuple[dict[str, Any], str, list[str]]] = {}
    for one in report["found"]["packages"]:
        key = (one["kind"], one["name"], one["version"], one["architecture"])
        entry = found.setdefault(key, (one, package_url(one, report["found"]["system"]), []))
        place = _printable(one["path"] + (f"!{one['within']}" if one["within"] else ""))
        if place not in entry[2] and len(entry[2]) < 20:
            entry[2].append(place)
    return list(found.values())


def cyclonedx(report: dict[str, Any]) -> dict[str, Any]:
    """The packages as a CycloneDX 1.5 document.

    Args:
        report: The document of ``--json``, of an image that was read.
    """
    components = []
    for number, (one, url, places) in enumerate(_places(report)):
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": f"package-{number}",
            "name": _printable(one["name"]) or "unknown",
            "version": _printable(one["version"]),
            "purl": url,
            "properties": [{"name": "kata:path", "value": place} for place in places],
        }
        if one["licence"]:
            component["licenses"] = [{"license": {"name": _printable(one["licence"])}}]
        components.append(component)
    image = report["image"]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{_identity(report)}",
        "version": 1,
        "metadata": {
            "timestamp": _now(),
            "tools": {
                "components": [
                    {
                        "type": "application",
                        "name": "kata inspect-image",
                        "version": report["tool"].split()[-1],
                    }
                ]
            },
            "component": {
                "type": "container",
                "bom-ref": "image",
                "name": _printable(image["name"]),
                "version": _printable(image["digest"]),
            },
        },
        "components": components,
    }


def spdx(report: dict[str, Any]) -> dict[str, Any]:
    """The packages as an SPDX 2.3 document; see `cyclonedx`."""
    image = report["image"]
    packages: list[dict[str, Any]] = [
        {
            "SPDXID": "SPDXRef-Image",
            "name": _printable(image["name"]),
            "versionInfo": _printable(image["digest"]),
            "downloadLocation": "NOASSERTION",
            "filesAnalyzed": False,
            "licenseConcluded": "NOASSERTION",
            "licenseDeclared": "NOASSERTION",
            "copyrightText": "NOASSERTION",
            "primaryPackagePurpose": "CONTAINER",
        }
    ]
    relationships = [
        {
            "spdxElementId": "SPDXRef-DOCUMENT",
            "relationshipType": "DESCRIBES",
            "relatedSpdxElement": "SPDXRef-Image",
        }
    ]
    for number, (one, url, places) in enumerate(_places(report)):
        identity = f"SPDXRef-Package-{number}"
        package = {
            "SPDXID": identity,
            "name": _printable(one["name"]) or "unknown",
            "versionInfo": _printable(one["version"]),
            "downloadLocation": "NOASSERTION",
            "filesAnalyzed": False,
            "licenseConcluded": "NOASSERTION",
            "licenseDeclared": "NOASSERTION",
            "copyrightText": "NOASSERTION",
            "sourceInfo": "recorded in " + ", ".join(places),
            "externalRefs": [
                {
                    "referenceCategory": "PACKAGE-MANAGER",
                    "referenceType": "purl",
                    "referenceLocator": url,
                }
            ],
        }
        if one["licence"]:
            package["licenseComments"] = _printable(one["licence"])
        packages.append(package)
        relationships.append(
            {
                "spdxElementId": "SPDXRef-Image",
                "relationshipType": "CONTAINS",
                "relatedSpdxElement": identity,
            }
        )
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": _printable(image["name"]),
        "documentNamespace": f"https://spdx.org/spdxdocs/kata-inspect-image-{_identity(report)}",
        "creationInfo": {
            "created": _now(),
            "creators": [f"Tool: kata-inspect-image-{report['tool'].split()[-1]}"],
        },
        "packages": packages,
        "relationships": relationships,
    }


def sarif(report: dict[str, Any]) -> dict[str, Any]:
    """The findings as a SARIF 2.1.0 log; see `cyclonedx`."""
    findings = report["found"]["findings"]
    kinds = sorted({one["kind"] for one in findings})
    rules = [
        {
            "id": _printable(kind),
            "shortDescription": {"text": inspect_kinds.meaning(kind)},
            "defaultConfiguration": {"level": _LEVELS[inspect_kinds.severity(kind)]},
        }
        for kind in kinds
    ]
    results = []
    for one in findings:
        layer = f" (layer {one['layer']})" if one["layer"] else ""
        path = one["path"].lstrip("/")
        results.append(
            {
                "ruleId": _printable(one["kind"]),
                "ruleIndex": kinds.index(one["kind"]),
                "level": _LEVELS[inspect_kinds.severity(one["kind"])],
                "message": {"text": _printable(one["detail"] or inspect_kinds.meaning(one["kind"])) + layer},
                "locations": [
                    {
                        "physicalLocation": {
                            "artifactLocation": {
                                "uri": quote(path, safe="/-._~", errors="replace") or "image"
                            }
                        }
                    }
                ],
            }
        )
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "kata inspect-image",
                        "version": report["tool"].split()[-1],
                        "rules": rules,
                    }
                },
                "automationDetails": {
                    "id": "kata-inspect-image/"
                    + quote(report["image"]["name"], safe="/-._~:", errors="replace")
                },
                "results": results,
            }
        ],
    }
