"""Who listens where the server should, and whether the Hub answers."""

import errno
import socket
from collections.abc import Iterator

import httpx2
import psutil

from lmx.cli.client import Client
from lmx.cli.doctor.finding import Finding, Patient
from lmx.cli.errors import CommandError, Refused, Unreachable
from lmx.hub.download.names import endpoint

SERVER_S = 5.0
HUB_S = 5.0


def check_server(patient: Patient) -> Iterator[Finding]:
    server = patient.settings.server
    if patient.host is None and server.port == 0:
        yield Finding("server", "ok", "[server] port is 0: any free one; name a running server with --host")
        return
    try:
        with Client(patient.address, timeout_s=SERVER_S) as client:
            hello = client.get("/api/hello")
            patient.serves = isinstance(hello, dict) and hello.get("name") == "lmx"
            url = client.url
    except (Refused, Unreachable):
        pass
    except CommandError as error:
        yield Finding("server", "fail", str(error))
        return
    if patient.serves:
        yield Finding("server", "ok", f"lmx {hello.get('version')} answers at {url}")
    elif patient.host is not None:
        text = f"no lmx answers at {patient.host}"
        yield Finding("server", "fail", text, "Is it started, and the address right? Its log: `lmx service logs`.")
    else:
        yield _port(server.host, server.port)


def _port(host: str, port: int) -> Finding:
    """Whether a server could listen there."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            text = f"port {port} is used by {_listener(port)}, which does not answer as lmx does"
            return Finding("server", "fail", text, "Stop it, or set [server] port.")
        way = "[server] host must be an address of this machine; ports below 1024 need root."
        return Finding("server", "fail", f"{host} port {port} cannot be used: {error.strerror or error}", way)
    return Finding("server", "ok", f"none runs; {host} port {port} is free")


def _listener(port: int) -> str:
    unknown = f"another program (`lsof -nP -iTCP:{port} -sTCP:LISTEN` names it)"
    try:
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid:
                return f"{psutil.Process(one.pid).name()} (pid {one.pid})"
    except (psutil.Error, OSError):
        pass
    return unknown


def check_hub(patient: Patient) -> Iterator[Finding]:
    if patient.offline:
        return
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        yield Finding("hub", "warn", "HF_HUB_OFFLINE forbids to ask the Hub: nothing can be downloaded", "Unset it.")
        return
    token = get_token()
    url = f"{endpoint()}/api/{'whoami-v2' if token else 'models?limit=1'}"
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx2.get(url, headers=headers, timeout=HUB_S, follow_redirects=True)
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        way = "Models on the disk run without it. A proxy is named by HTTPS_PROXY, a mirror by HF_ENDPOINT."
        text = f"{endpoint()} cannot be reached ({type(error).__name__}): nothing can be downloaded"
        yield Finding("hub", "warn", text, way)
        return
    if answer.status_code in (401, 403) and token:
        way = "Make a new one there, and set HF_TOKEN or `hf auth login`."
        yield Finding("hub", "warn", f"{endpoint()} answers, and refuses the token", way)
    elif answer.status_code >= 400:
        way = "Try later; https://status.huggingface.co tells more."
        yield Finding("hub", "warn", f"{endpoint()} answers with {answer.status_code}", way)
    elif token:
        yield Finding("hub", "ok", f"{endpoint()} answers and takes the token")
    else:
        yield Finding("hub", "ok", f"{endpoint()} answers; no token, which only gated models need")
