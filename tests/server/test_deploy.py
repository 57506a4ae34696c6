"""`server/deploy`: the files that operators copy agree with the server, and with each other."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lom_server.config import ServerConfig, host_and_port, is_reachable_from_elsewhere
from lom_server.settings import ENVIRONMENT_PREFIX, read_settings

Document: TypeAlias = Mapping[str, Any]

PROJECT = Path(__file__).parents[2]
DEPLOY = PROJECT / "server" / "deploy"
UID = 10001

DOCKER_INSTRUCTIONS = {
    "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "ONBUILD", "RUN",
    "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip


def documents(name: str) -> dict[str, Document]:
    """The documents of a YAML file by their kind."""
    return {document["kind"]: document for document in yaml.safe_load_all((DEPLOY / name).read_text())}


def settings_of(container: Document) -> ServerConfig:
    """What the server makes of a container's environment and arguments; refused where they cannot be meant."""
    environ = {variable["name"]: variable["value"] for variable in container["env"]}
    return read_settings(container.get("args", []), environ).config


def pod() -> Document:
    """The pod of `kubernetes.yaml`."""
    template: Document = documents("kubernetes.yaml")["Deployment"]["spec"]["template"]
    return template


def kserve_container() -> Document:
    (container,) = documents("kserve.yaml")["ClusterServingRuntime"]["spec"]["containers"]
    named: Document = container
    return named


def port_of(address: str) -> int:
    return host_and_port("address", address)[1]


def seconds(text: str) -> float:
    """A time span of systemd."""
    number, unit = re.fullmatch(r"(\d+)(min|s|)", text).groups()  # type: ignore[union-attr]
    return int(number) * (60 if unit == "min" else 1)


# --- lom-serve.toml -------------------------------------------------------------------------------------------------


def example() -> ServerConfig:
    return read_settings(["--config", str(DEPLOY / "lom-serve.toml")], {}).config


def test_the_example_configuration_is_one() -> None:
    assert example() == ServerConfig(
        models=Path("/var/lib/lom/models"),
        admin_listen="unix:/run/lom/admin.sock",
        metrics_listen="127.0.0.1:8002",
    )


def test_the_example_has_every_setting_and_true_defaults() -> None:
    text = (DEPLOY / "lom-serve.toml").read_text()
    uncommented = tomllib.loads(re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE))
    assert uncommented.keys() == {field.name for field in fields(ServerConfig)}
    defaults = ServerConfig(models=Path("models")).to_plain()
    set_in_example = tomllib.loads(text).keys()
    for field in fields(ServerConfig):
        if field.default is not MISSING and defaults[field.name] is not None and field.name not in set_in_example:
            assert uncommented[field.name] == defaults[field.name], field.name


# --- lom-serve.service ----------------------------------------------------------------------------------------------


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / "lom-serve.service")
    return parser


def test_the_unit_waits_watches_and_drains() -> None:
    service = unit()["Service"]
    config = example()
    assert service["Type"] == "notify"
    assert service["KillSignal"] == "SIGTERM"
    assert service["KillMode"] == "mixed"
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == "2"
    assert seconds(service["WatchdogSec"]) > 0
    assert seconds(service["TimeoutStopSec"]) > config.grace_s
    assert seconds(service["TimeoutStartSec"]) > config.load_limit_s
    assert int(service["LimitNOFILE"]) >= 4 * config.max_connections
    assert "[Install]\nWantedBy=multi-user.target" in (DEPLOY / "lom-serve.service").read_text()


def test_the_unit_owns_the_folders_that_the_example_names() -> None:
    service = unit()["Service"]
    config = example()
    assert service["ExecStart"].endswith("/lom-serve --config /etc/lom/lom-serve.toml")
    assert config.models.is_relative_to(f"/var/lib/{service['StateDirectory']}")
    assert config.admin_listen.startswith(f"unix:/run/{service['RuntimeDirectory']}/")
    assert service["ProtectSystem"] == "strict"


def test_the_unit_is_never_root() -> None:
    service = unit()["Service"]
    assert service["User"] == service["Group"] == "lom"
    assert service["NoNewPrivileges"] == "yes"
    assert service["CapabilityBoundingSet"] == ""


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_every_line_of_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / "lom-serve.service"
    # systemd-analyze also looks for the program, which is not installed here.
    copy.write_text((DEPLOY / "lom-serve.service").read_text().replace("/opt/lom/bin/lom-serve", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "lom-serve" in line]) == (0, [])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_exposes_little() -> None:
    security = ("systemd-analyze", "security", "--offline=true", "--no-pager")
    if subprocess.run([*security, "--help"], capture_output=True, check=False).returncode:
        pytest.skip("needs a systemd-analyze that looks at files")
    limit = 20  # tenths; systemd calls 5.0 and more "medium"
    unit_file = str(DEPLOY / "lom-serve.service")
    done = subprocess.run([*security, f"--threshold={limit}", unit_file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


# --- Dockerfile -----------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, with continued lines joined."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def final_stage() -> list[tuple[str, str]]:
    every = instructions()
    last = max(number for number, (name, _) in enumerate(every) if name == "FROM")
    return every[last:]


def image_environment() -> dict[str, str]:
    (text,) = (rest for name, rest in final_stage() if name == "ENV")
    return dict(pair.split("=", 1) for pair in text.split())


def test_the_dockerfile_has_two_stages_of_known_instructions() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) <= DOCKER_INSTRUCTIONS
    assert names.count("FROM") == 2
    assert [name for name, _ in final_stage()].count("COPY") == 1  # the virtual environment, no sources
    for name, rest in final_stage():
        if name in ("ENTRYPOINT", "HEALTHCHECK"):
            assert json.loads(rest[rest.index("[") :])


def test_everything_that_the_image_copies_is_there() -> None:
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (PROJECT / source).exists(), source
    kept = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert any(Path(source).is_relative_to(folder) for folder in kept), source


def test_the_image_is_never_root() -> None:
    users = [rest for name, rest in final_stage() if name == "USER"]
    assert users == [f"{UID}:{UID}"]
    names = [name for name, _ in final_stage()]
    assert "RUN" not in names[names.index("USER") :]
    created = " ".join(rest for name, rest in final_stage() if name == "RUN")
    assert f"--uid {UID}" in created
    assert f"--gid {UID}" in created


@pytest.mark.parametrize("runtime", ["server", "gpu"])
def test_the_image_installs_one_runtime_and_no_torch(runtime: str) -> None:
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
    (installed,) = re.findall(r'"\.\[(.*?)\]"', " ".join(installs))
    wanted = set(installed.replace("${RUNTIME}", runtime).split(","))
    requirements: list[str] = []
    while wanted:
        for requirement in extras[wanted.pop()]:
            own = re.fullmatch(r"lom\[(.*)\]", requirement)
            if own is None:
                requirements.append(re.split(r"[\[<>=!~ ]", requirement)[0])
            else:
                wanted |= set(own[1].split(","))
    assert "grpcio" in requirements
    assert [name for name in requirements if name.startswith("onnxruntime")] == [
        "onnxruntime" if runtime == "server" else "onnxruntime-gpu"
    ]
    assert not {"torch", "onnx", "gymnasium"} & set(requirements)
    assert any("torch" in rest and "find_spec" in rest for name, rest in instructions() if name == "RUN")


def test_the_image_s_environment_is_a_configuration() -> None:
    environ = {name: value for name, value in image_environment().items() if name.startswith(ENVIRONMENT_PREFIX)}
    config = read_settings([], environ).config
    assert config.models == Path("/models")
    # An image that anybody may start must not open a port to everybody.
    assert not is_reachable_from_elsewhere(config.listen)
    (exposed,) = (rest.split() for name, rest in final_stage() if name == "EXPOSE")
    assert exposed == [str(port_of(config.listen)), "8002"]


@contextmanager
def health_server(status: "health_pb2.HealthCheckResponse.ServingStatus") -> Iterator[str]:
    servicer = health.HealthServicer()
    servicer.set("", status)
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"0.0.0.0:{port}"
        server.stop(None).wait()


def health_check(listen: str) -> int:
    (command,) = (json.loads(rest[rest.index("[") :]) for name, rest in final_stage() if name == "HEALTHCHECK")
    assert command[0] == "python"
    environ = os.environ | {"LOM_SERVE_LISTEN": listen}
    return subprocess.run([sys.executable, *command[1:]], env=environ, capture_output=True, check=False).returncode


def test_the_health_check_knows_a_server_that_serves() -> None:
    with health_server(health_pb2.HealthCheckResponse.SERVING) as address:
        assert health_check(address) == 0
    assert health_check(address) == 1
    with health_server(health_pb2.HealthCheckResponse.NOT_SERVING) as address:
        assert health_check(address) == 1


# --- kubernetes.yaml ------------------------------------------------------------------------------------------------


def test_the_pod_s_environment_is_a_configuration_with_the_pod_s_ports() -> None:
    (container,) = pod()["spec"]["containers"]
    config = settings_of(container)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": port_of(config.listen), "metrics": port_of(config.metrics_listen)}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": ports["grpc"]}
    service = documents("kubernetes.yaml")["Service"]["spec"]
    assert {port["port"]: port["targetPort"] for port in service["ports"]} == {8001: "grpc", 8002: "metrics"}
    annotations = pod()["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["metrics"])
    ingress = documents("kubernetes.yaml")["NetworkPolicy"]["spec"]["ingress"]
    assert [rule["ports"][0]["port"] for rule in ingress] == list(ports.values())
    assert all(rule["from"] for rule in ingress)


def test_plaintext_comes_with_a_policy_of_who_may_reach_it() -> None:
    (container,) = pod()["spec"]["containers"]
    assert settings_of(container).insecure
    policy = documents("kubernetes.yaml")["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= pod()["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []


def test_the_pod_has_time_to_start_and_to_drain() -> None:
    (container,) = pod()["spec"]["containers"]
    config = settings_of(container)
    assert pod()["spec"]["terminationGracePeriodSeconds"] > config.grace_s
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > config.load_limit_s
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > config.grace_s
    assert "lifecycle" not in container


def test_the_pod_may_nothing_but_serve() -> None:
    spec = pod()["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == UID
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not spec["automountServiceAccountToken"]
    assert container["resources"]["limits"]["memory"]


def test_the_pod_s_volumes_are_where_the_server_looks() -> None:
    spec = pod()["spec"]
    (container,) = spec["containers"]
    config = settings_of(container)
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in spec["volumes"]}
    assert Path(mounts["models"]["mountPath"]) == config.models
    assert mounts["models"]["readOnly"]
    assert config.admin_listen.startswith(f"unix:{mounts['run']['mountPath']}/")
    assert mounts["tmp"]["mountPath"] == "/tmp"


def test_selectors_find_the_pod() -> None:
    labels = pod()["metadata"]["labels"].items()
    every = documents("kubernetes.yaml")
    assert every.keys() == {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}
    for selector in (
        every["Deployment"]["spec"]["selector"]["matchLabels"],
        every["Service"]["spec"]["selector"],
        every["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    assert every["PodDisruptionBudget"]["spec"]["minAvailable"] < every["Deployment"]["spec"]["replicas"]


def test_no_service_puts_strange_settings_into_the_environment() -> None:
    # Kubernetes makes NAME_PORT of every Service's name.
    assert not documents("kubernetes.yaml")["Service"]["metadata"]["name"].startswith("lom-serve")
    assert not documents("kserve.yaml")["InferenceService"]["metadata"]["name"].startswith("lom-serve")
    assert pod()["spec"]["enableServiceLinks"] is False


# --- kserve.yaml ----------------------------------------------------------------------------------------------------


def test_the_runtime_s_container_is_a_configuration_with_its_ports() -> None:
    container = kserve_container()
    config = settings_of(container)
    assert container["name"] == "kserve-container"
    assert config.models == Path("/mnt/models")
    assert container["ports"] == [{"name": "h2c", "containerPort": port_of(config.listen), "protocol": "TCP"}]
    assert container["readinessProbe"]["grpc"] == {"port": port_of(config.listen)}
    annotations = documents("kserve.yaml")["ClusterServingRuntime"]["spec"]["annotations"]
    assert annotations["prometheus.kserve.io/port"] == str(port_of(config.metrics_listen))
    assert container["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["runAsUser"] == UID
    assert container["securityContext"]["readOnlyRootFilesystem"]


def test_the_inference_service_asks_for_the_runtime() -> None:
    every = documents("kserve.yaml")
    runtime = every["ClusterServingRuntime"]
    model = every["InferenceService"]["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    (supported,) = runtime["spec"]["supportedModelFormats"]
    assert model["modelFormat"].items() <= supported.items()


# --- README.md ------------------------------------------------------------------------------------------------------


def test_the_readme_names_every_file() -> None:
    readme = (DEPLOY / "README.md").read_text()
    for path in DEPLOY.iterdir():
        assert path.name == "README.md" or f"`{path.name.removesuffix('.dockerignore')}`" in readme, path.name
