"""A judge behind HTTP, for reward_server.py to ask: where it needs an environment of its own.

    python -m argrpo.rewards.serving my_judge:score --port 8085
    python serving.py my_judge:score --port 8085         where argrpo is not installed

`score(images, prompts)` gets Pillow images and texts and returns a number for each, or None. A
third parameter `metadata` gets what the client sends of each prompt. In an environment with argrpo,
`serve(of_judge(judge))` serves one of its judges.

This file imports nothing but the standard library and Pillow, so that it may be copied into the
judge's environment. There is no login: serve on the loopback address, or behind what has one.
"""

import argparse
import base64
import binascii
import importlib
import inspect
import io
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

Score = Callable[..., Sequence[Any]]

_LOG = logging.getLogger(__name__)
_MAX_BYTES = 1 << 28  # of a request; 64 images of 1024 pixels a side are below


def serve(score: Score, *, host: str = "127.0.0.1", port: int = 8085) -> None:
    """Answer requests until the process is stopped."""
    with make_server(score, host=host, port=port) as server:
        _LOG.info("listening at http://%s:%d", *server.server_address[:2])
        server.serve_forever()


def make_server(score: Score, *, host: str = "127.0.0.1", port: int = 8085) -> ThreadingHTTPServer:
    """A server that is bound and not yet running; port 0 takes a free one."""
    takes_metadata = "metadata" in inspect.signature(score).parameters
    # Requests are read side by side; a judge and its GPU are asked one after the other.
    turn = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        """One request."""

        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if not 0 < length <= _MAX_BYTES:
                self._answer(
                    413 if length else 411, {"error": f"expected up to {_MAX_BYTES} bytes"}
                )
                return
            try:
                request = json.loads(self.rfile.read(length))
                images = [_image(text) for text in request["images"]]
                arguments = [images, [str(text) for text in request["prompts"]]]
                if takes_metadata:
                    arguments.append(request["metadata"])
            except (ValueError, TypeError, KeyError, OSError) as error:
                self._answer(400, {"error": f"expected images and prompts, got {error!r}"})
                return
            try:
                with turn:
                    scores = [_number(value) for value in score(*arguments)]
            except Exception as error:
                _LOG.exception("the judge failed")
                self._answer(500, {"error": repr(error)})
                return
            self._answer(200, {"scores": scores})

        def log_message(self, format: str, *arguments: Any) -> None:
            _LOG.debug(format, *arguments)

        def _answer(self, code: int, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if code in (411, 413):
                # The body was not read, so nothing after it on this connection makes sense.
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            self.wfile.write(content)

    return ThreadingHTTPServer((host, port), Handler)


def of_judge(judge: Any) -> Score:
    """One of argrpo's judges as a `score`; here torch and argrpo are needed."""
    import numpy as np
    import torch

    from argrpo.data import Prompt

    def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
        levels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
        pixels = torch.stack(levels).float() / 255.0
        scores: list[float] = judge(pixels, [Prompt(text) for text in prompts]).tolist()
        return scores

    return score


def _image(text: str) -> Image.Image:
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"no base64: {error}") from error
    return Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGB")


def _number(value: Any) -> float | None:
    """JSON has neither NaN nor infinity."""
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser(prog="serving", description="Serve a judge over HTTP.")
    parser.add_argument("score", help="module:function of images and prompts")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8085)
    chosen = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    sys.path.append(os.getcwd())
    module, _, name = chosen.score.partition(":")
    serve(getattr(importlib.import_module(module), name), host=chosen.host, port=chosen.port)


if __name__ == "__main__":
    main()
