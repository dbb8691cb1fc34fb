"""Health check of a server in its own container: exit 0 when http://127.0.0.1:PORT/ready says so.

Asked directly: containers often have the proxies of Docker's client in their environment.
"""

import sys
import urllib.error
import urllib.request

TIMEOUT_S = 4


def is_ready(port: int) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://127.0.0.1:{port}/ready", timeout=TIMEOUT_S) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


if __name__ == "__main__":
    sys.exit(0 if is_ready(int(sys.argv[1])) else 1)
