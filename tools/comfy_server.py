"""A real ComfyUI, on the CPU unless told otherwise, with this pack in it: start, ask, stop.

    python -m tools.comfy_server --port 8188                  # what `make comfyui` runs, until Ctrl-C

    with ComfyServer(folder) as server:                       # what tests and the demo use
        result = server.run(prompt)                           # prompt: graph in API format
        picture = server.view(result.images("9")[0])          # bytes of the PNG that node 9 saved

`folder` becomes ComfyUI's base directory (models, input, output, user, custom_nodes). This repository is
linked into its custom_nodes, so the server loads the pack the way it does for everybody.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import websocket

from tools.comfy_results import (
    Events,
    PromptRejectedError,
    Result,
    record,
    rejection_text,
    result_from_history,
)

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = ROOT / ".venv" / "comfyui"
PACK = "ComfyUI-DRM"
DEMO_CHECKPOINT = ROOT / "models" / "checkpoints" / "drm_demo_emoji_sd3.safetensors"
FOLDERS = ("custom_nodes", "input", "models", "output", "temp", "user/default")
# First visitors get the template browser on top of the graph; these settings say that they have seen it.
PAGE_SETTINGS = {
    "Comfy.InstalledVersion": "1.32.9",
    "Comfy.Release.Status": "skip",
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": True,
    "Comfy.Workflow.ShowMissingNodesWarning": True,
}


class ServerError(RuntimeError):
    """The server did not start, died, or answered with an error."""


class ComfyServer:
    """One ComfyUI process; a context manager, or start() and stop()."""

    def __init__(
        self,
        base_dir: Path | str,
        *,
        port: int | None = None,
        log: Path | str | None = None,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        cpu: bool = True,
        startup_timeout: float = 240.0,
    ) -> None:
        """`arguments` go on ComfyUI's command line, `environment` on top of ours; port None: a free one.
        cpu False: the device that ComfyUI chooses.
        """
        self.base_dir = Path(base_dir).resolve()
        self.port = port or free_port()
        self.log = Path(log) if log else self.base_dir / "server.log"
        self.startup_timeout = startup_timeout
        self.arguments = list(arguments)
        self.environment = environment or {}
        self.cpu = cpu
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "ComfyServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # process

    def start(self) -> None:
        """Start the process, return once it answers; ServerError with the end of its log when it does not."""
        if not (COMFYUI / "main.py").exists():
            raise ServerError(f"no ComfyUI in {COMFYUI}: run `make env` first")
        prepare_base_dir(self.base_dir)
        if port_in_use(self.port):
            raise ServerError(f"port {self.port} is in use: choose another one")
        command = [sys.executable, str(COMFYUI / "main.py"), *self._flags(), *self.arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.base_dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop it
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | self.environment,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _flags(self) -> list[str]:
        database = (self.base_dir / "user" / "comfyui.db").as_posix()
        flags = [
            *(["--cpu"] if self.cpu else []),
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--base-directory",
            str(self.base_dir),
        ]
        return [
            *flags,
            "--disable-api-nodes",
            "--disable-auto-launch",
            "--database-url",
            f"sqlite:///{database}",
        ]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.startup_timeout
        while time.monotonic() < deadline:
            self._check_alive()
            try:
                self.get("/system_stats", timeout=5)
                return
            except (OSError, ServerError):
                time.sleep(0.2)
        raise ServerError(
            f"ComfyUI did not answer within {self.startup_timeout:.0f} s. Its log ends:\n{self.log_tail()}"
        )

    def _check_alive(self) -> None:
        if self.process is None:
            raise ServerError("the server was not started")
        if self.process.poll() is not None:
            code = self.process.returncode
            raise ServerError(f"ComfyUI ended with exit code {code}. Its log ends:\n{self.log_tail()}")

    def stop(self, timeout: float = 20.0) -> None:
        """SIGINT, as Ctrl-C would; kill when that does not end it."""
        if self.process is None:
            return
        if self.process.poll() is None:
            # Started in the background we ignore SIGINT, and so does what we start.
            ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            self.process.send_signal(signal.SIGTERM if ignored else signal.SIGINT)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    def log_text(self) -> str:
        """Everything the server printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def log_tail(self, lines: int = 30) -> str:
        """The last lines the server printed."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    # requests

    def request(self, path: str, body: bytes | None, content_type: str, timeout: float) -> bytes:
        """GET (body None) or POST; urllib's HTTPError for an answer that is not 2xx."""
        headers = {"Content-Type": content_type} if body is not None else {}
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.read()

    def get(self, path: str, timeout: float = 60.0) -> Any:
        """GET, decoded JSON."""
        return json.loads(self.request(path, None, "", timeout))

    def post(self, path: str, data: Any, timeout: float = 60.0) -> Any:
        """POST JSON; decoded JSON or None for an empty answer."""
        answer = self.request(path, json.dumps(data).encode(), "application/json", timeout)
        return json.loads(answer) if answer else None

    def object_info(self, node_id: str | None = None) -> dict[str, Any]:
        """Every node's sockets and widgets as the page gets them, or one node's."""
        return self.get("/object_info") if node_id is None else self.get(f"/object_info/{node_id}")[node_id]

    def queue(
        self, prompt: dict[str, Any], *, client_id: str | None = None, workflow: dict[str, Any] | None = None
    ) -> str:
        """Queue a graph in API format, return its id; `workflow`, the page's graph, is saved in pictures."""
        request: dict[str, Any] = {"prompt": prompt}
        if client_id is not None:
            request["client_id"] = client_id
        if workflow is not None:
            request["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        try:
            return self.post("/prompt", request)["prompt_id"]
        except urllib.error.HTTPError as error:
            answer = error.read().decode(errors="replace")
            raise PromptRejectedError(rejection_text(answer)) from None

    def wait(self, prompt_id: str, timeout: float = 600.0) -> Result:
        """Wait until a queued prompt is done; an error inside the graph is in the result, not raised."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return result_from_history(prompt_id, history[prompt_id])
            self._check_alive()
            time.sleep(0.05)
        raise TimeoutError(
            f"prompt {prompt_id} not done after {timeout:.0f} s. The log ends:\n{self.log_tail()}"
        )

    def run(
        self, prompt: dict[str, Any], *, timeout: float = 600.0, workflow: dict[str, Any] | None = None
    ) -> Result:
        """queue() and wait()."""
        return self.wait(self.queue(prompt, workflow=workflow), timeout)

    def interrupt(self) -> None:
        """What the page's Cancel button does."""
        self.post("/interrupt", {})

    def queue_state(self) -> dict[str, int]:
        """Number of prompts {"running", "pending"}."""
        queue = self.get("/queue")
        return {"running": len(queue["queue_running"]), "pending": len(queue["queue_pending"])}

    def upload_image(self, path: Path | str) -> str:
        """Put a picture into the input folder through the server; returns the name LoadImage takes."""
        path = Path(path)
        boundary = uuid.uuid4().hex
        disposition = f'Content-Disposition: form-data; name="image"; filename="{path.name}"'
        head = f"--{boundary}\r\n{disposition}\r\nContent-Type: application/octet-stream\r\n\r\n".encode()
        body = head + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        return json.loads(
            self.request("/upload/image", body, f"multipart/form-data; boundary={boundary}", 60)
        )["name"]

    def view(self, image: dict[str, str]) -> bytes:
        """Bytes of a picture from Result.images()."""
        return self.request(f"/view?{urllib.parse.urlencode(image)}", None, "", 60)

    @contextmanager
    def events(self) -> Iterator[Events]:
        """Record what a page would see; queue(..., client_id=events.client_id) inside the block."""
        events = Events(client_id=uuid.uuid4().hex)
        connection = websocket.create_connection(
            f"ws://127.0.0.1:{self.port}/ws?clientId={events.client_id}", timeout=60
        )
        connection.recv()  # the greeting: from here on the server knows this client
        connection.settimeout(None)
        thread = threading.Thread(target=record, args=(connection, events), daemon=True)
        thread.start()
        try:
            yield events
            events.settle()
        finally:
            connection.abort()  # unlike close(), it wakes the thread that reads
            thread.join(timeout=10)
            connection.shutdown()


def prepare_base_dir(base_dir: Path) -> None:
    """Make the folders ComfyUI expects, link this repository into custom_nodes, skip the first-visit tour."""
    for name in FOLDERS:
        (base_dir / name).mkdir(parents=True, exist_ok=True)
    link = base_dir / "custom_nodes" / PACK
    if not link.exists():
        if link.is_symlink():
            link.unlink()
        link.symlink_to(ROOT, target_is_directory=True)
    settings = base_dir / "user" / "default" / "comfy.settings.json"
    if not settings.exists():
        settings.write_text(json.dumps(PAGE_SETTINGS, indent=4))


def demo_previews(base_dir: Path, checkpoint: Path = DEMO_CHECKPOINT) -> None:
    """The demo model's decoder where ComfyUI looks for SD3's small one, unless there is one: previews."""
    from safetensors.torch import load_file, save_file

    target, prefix = base_dir / "models" / "vae_approx" / "taesd3_decoder.safetensors", "taesd_decoder."
    if target.exists() or not checkpoint.exists():
        return
    weights = {
        name.partition(prefix)[2]: value for name, value in load_file(checkpoint).items() if prefix in name
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone() for name, value in weights.items()}, target.with_suffix(".tmp"))
    target.with_suffix(".tmp").rename(target)


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def port_in_use(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Run ComfyUI with this pack until Ctrl-C.")
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument(
        "--base-dir", type=Path, default=ROOT / ".comfyui", help="models, output, user data (%(default)s)"
    )
    parser.add_argument("--gpu", action="store_true", help="the device ComfyUI chooses, not the CPU")
    options = parser.parse_args()
    demo_previews(options.base_dir)
    previews = ["--preview-method", "taesd"]
    server = ComfyServer(options.base_dir, port=options.port, cpu=not options.gpu, arguments=previews)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(
        f"Starting ComfyUI{'' if options.gpu else ' on the CPU'}; models and pictures in {server.base_dir}",
        flush=True,
    )
    try:
        with server:
            print(f"Open {server.url} - stop with Ctrl-C. Log: {server.log}", flush=True)
            server.process.wait()
            print(f"ComfyUI ended. Its log ends:\n{server.log_tail()}")
    except KeyboardInterrupt:
        print("\nStopped.")
    except ServerError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
