"""The cluster's S3 server: a process of the host on the bridge, so that pods and host use the same endpoint."""

from __future__ import annotations

from pathlib import Path

from deploy.local.cluster import processes
from deploy.local.cluster.layout import HOST, S3_PORT, ClusterError, Layout
from deploy.local.s3.server import S3Server, ServerUnavailable, binary

BUCKET = "finetune"


def program() -> Path:
    """The server's executable, built now if need be.

    Raises:
        ClusterError: it cannot be built.
    """
    try:
        return binary()
    except ServerUnavailable as error:
        raise ClusterError(str(error)) from error


def start(layout: Layout) -> S3Server:
    """Start it, with the credentials it had before if there were any; objects stay where they are.

    Raises:
        ClusterError: it runs already, or does not start.
    """
    if "s3" in processes.recorded(layout):
        raise ClusterError("The S3 server runs.")
    instance = server(layout)
    instance.launched = lambda pid: processes.record(layout, "s3", pid)  # known to `down` however this ends
    try:
        instance.start()
    except ServerUnavailable as error:
        raise ClusterError(str(error)) from error
    assert instance.process is not None
    instance.process.returncode = 0  # `processes` ends it; the object shall not wait for it
    instance.create_bucket(BUCKET)
    if not layout.s3_environment.exists():
        layout.s3_environment.touch(mode=0o600)
        lines = [f"{name}={value}\n" for name, value in instance.environment.items()]
        layout.s3_environment.write_text("".join(lines))
    return instance


def stop(layout: Layout) -> None:
    """Connections are refused from now on; objects stay.

    Raises:
        ClusterError: it does not run.
    """
    pid = processes.recorded(layout).get("s3")
    if pid is None:
        raise ClusterError("The S3 server does not run.")
    processes.end([pid])


def server(layout: Layout) -> S3Server:
    """The server as an object (buckets, files of objects, environment), not started."""
    instance = S3Server(layout.s3_directory, port=S3_PORT, address=HOST)
    if layout.s3_environment.is_file():
        known = dict(line.split("=", 1) for line in layout.s3_environment.read_text().splitlines())
        instance.access_key, instance.secret_key = known["AWS_ACCESS_KEY_ID"], known["AWS_SECRET_ACCESS_KEY"]
    return instance
