"""Make `rayjob.json` from KubeRay's custom resource definition: the schema of one version, small and strict.

    python tests/schemas/strip.py ray.io_rayjobs.yaml > tests/schemas/rayjob.json

Descriptions and the status go, what occurs several times is written once under `$defs`, and an object with named
properties takes no others unless the definition says `x-kubernetes-preserve-unknown-fields`, as the API server's own
strict validation has it.
"""

import json
import sys
from collections import Counter
from hashlib import sha256
from typing import Any

import yaml

SOURCE = {
    "$comment": (
        "From ray-operator/config/crd/bases/ray.io_rayjobs.yaml of KubeRay 1.7, github.com/ray-project/kuberay, "
        "Apache License 2.0, changed by tests/schemas/strip.py: descriptions and status removed, repeated parts "
        "shared, unknown fields refused."
    )
}
VERSION = "v1"
WORTH_SHARING = 120


def strict(schema: Any) -> Any:
    """The schema without descriptions, and with unknown fields refused."""
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key not in ("description", "default", "format")}
    kept = {key: value for key, value in kept.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        # `anyOf` integer or string beside it says the same.
        kept.pop("type", None)
    for key in ("items", "additionalProperties"):
        if key in kept:
            kept[key] = strict(kept[key])
    if "properties" in kept:
        kept["properties"] = {name: strict(part) for name, part in kept["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept.setdefault("additionalProperties", False)
    return kept


def shared(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema with every part that occurs more than once moved to `$defs`."""
    seen: Counter[str] = Counter()

    def count(part: Any) -> None:
        if isinstance(part, dict):
            seen[text(part)] += 1
            if seen[text(part)] == 1:
                for inner in part.values():
                    count(inner)

    definitions: dict[str, Any] = {}

    def write(part: Any, schema_here: bool) -> Any:
        if not isinstance(part, dict):
            return part
        name = sha256(text(part).encode()).hexdigest()[:8]
        if schema_here and seen[text(part)] > 1 and len(text(part)) > WORTH_SHARING:
            if name not in definitions:
                definitions[name] = None
                definitions[name] = inside(part)
            return {"$ref": f"#/$defs/{name}"}
        return inside(part)

    def inside(part: dict[str, Any]) -> dict[str, Any]:
        made = {}
        for key, value in part.items():
            if key == "properties":
                made[key] = {field: write(inner, True) for field, inner in value.items()}
            else:
                made[key] = write(value, key in ("items", "additionalProperties"))
        return made

    count(schema)
    top = inside(schema)
    return {**top, "$defs": definitions}


def text(part: Any) -> str:
    return json.dumps(part, sort_keys=True)


def main() -> None:
    with open(sys.argv[1]) as file:
        definition = yaml.safe_load(file)
    version = next(v for v in definition["spec"]["versions"] if v["name"] == VERSION)
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"].pop("status", None)
    # The definition leaves these to the API server.
    schema["properties"]["metadata"]["x-kubernetes-preserve-unknown-fields"] = True
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    schema["properties"]["apiVersion"]["enum"] = [f"{definition['spec']['group']}/{VERSION}"]
    schema["properties"]["kind"]["enum"] = [definition["spec"]["names"]["kind"]]
    print(json.dumps(SOURCE | shared(strict(schema)), separators=(",", ":")))


if __name__ == "__main__":
    main()
