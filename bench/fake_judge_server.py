"""A judge's server that takes its time: chat completions, every answer after a latency.

    python bench/fake_judge_server.py --latency_s 2

Prints its address once it listens. Answers differ by image, so that groups have something to
compare. A process of its own, so that its work is not the trainer's.
"""

import argparse
import json
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def server(latency_s: float) -> ThreadingHTTPServer:
    """A server on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        """One request, in a thread of its own."""

        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(latency_s)
            score = zlib.crc32(content) % 6
            choice = {"message": {"content": f'{{"score": {score}}}'}, "finish_reason": "stop"}
            answer = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """A row says what happened."""

    class Server(ThreadingHTTPServer):
        # All images of a step connect at once; the default queue of 5 would hold them up.
        request_queue_size = 256

    return Server(("127.0.0.1", 0), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--latency_s", type=float, default=2.0, help="seconds before each answer")
    made = server(parser.parse_args().latency_s)
    print(f"http://127.0.0.1:{made.server_address[1]}", flush=True)
    made.serve_forever()


if __name__ == "__main__":
    main()
