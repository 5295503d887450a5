"""A real Kubernetes of two or three nodes on this machine; see docs/local-cluster.md.

python -m deploy.local.cluster setup | up [--nodes N] [--reuse] | down | status | env
python -m deploy.local.cluster node off|crash|boot|cut|heal NODE
python -m deploy.local.cluster component kill|start NODE kubelet|containerd|kube-proxy
python -m deploy.local.cluster s3 stop|start
python -m deploy.local.cluster load ARCHIVE            import an image archive into all nodes
python -m deploy.local.cluster exec NODE COMMAND...    inside the node's namespaces
python -m deploy.local.cluster tool PROGRAM            the path of kubectl, helm, kwok, promtool, ... (built if need be)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.local.cluster import cluster, machine, node, object_storage, stores, tools
from deploy.local.cluster.layout import HOST, PROMETHEUS, S3_PORT, ClusterError, Layout


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after one sentence on the standard error stream."""
    options = _parser().parse_args(arguments)
    try:
        return int(_ACTIONS[options.action](options) or 0)
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.local.cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("setup", help="install packages and build tools")
    up = actions.add_parser("up", help="start")
    up.add_argument("--nodes", type=int, default=2)
    up.add_argument("--reuse", action="store_true", help="a cluster that runs is good enough")
    for name in ("down", "status", "env"):
        actions.add_parser(name)
    power = actions.add_parser("node", help="faults of a whole node")
    power.add_argument("fault", choices=["off", "crash", "boot", "cut", "heal"])
    power.add_argument("node")
    part = actions.add_parser("component", help="faults of one process of a node")
    part.add_argument("fault", choices=["kill", "start"])
    part.add_argument("node")
    part.add_argument("component", choices=node.COMPONENTS)
    actions.add_parser("s3", help="faults of object storage").add_argument("fault", choices=["stop", "start"])
    actions.add_parser("load").add_argument("archive", type=Path)
    execute = actions.add_parser("exec")
    execute.add_argument("node")
    execute.add_argument("command", nargs=argparse.REMAINDER)
    actions.add_parser("tool").add_argument("program")
    return parser


def _setup(_: argparse.Namespace) -> None:
    cluster.setup()
    tools.program("helm")  # no cluster needs it, but nearly everybody who starts one installs something


def _up(options: argparse.Namespace) -> None:
    _print_environment(cluster.up(options.nodes, options.reuse))


def _down(_: argparse.Namespace) -> None:
    cluster.down()


def _status(_: argparse.Namespace) -> None:
    print(json.dumps(cluster.status(cluster.require_running()), indent=2))


def _env(_: argparse.Namespace) -> None:
    _print_environment(cluster.require_running())


def _node(options: argparse.Namespace) -> None:
    with machine.cluster_lock():
        layout = cluster.require_running()
        target = layout.node(options.node)
        if options.fault == "cut":
            node.cut(target)
        elif options.fault == "heal":
            node.heal(target)
        else:
            {"off": node.power_off, "crash": node.crash, "boot": node.boot}[options.fault](layout, target)


def _component(options: argparse.Namespace) -> None:
    with machine.cluster_lock():
        layout = cluster.require_running()
        act = {"kill": node.kill_component, "start": node.start_component}[options.fault]
        act(layout, layout.node(options.node), options.component)


def _s3(options: argparse.Namespace) -> None:
    with machine.cluster_lock():
        {"stop": object_storage.stop, "start": object_storage.start}[options.fault](cluster.require_running())


def _load(options: argparse.Namespace) -> None:
    stores.load(cluster.require_running(), options.archive)


def _exec(options: argparse.Namespace) -> None:
    layout = cluster.require_running()
    command = node.enter_command(layout, layout.node(options.node), options.command or ["/bin/sh"])
    os.execvp(command[0], command)


def _tool(options: argparse.Namespace) -> None:
    print(tools.program(options.program))


def _print_environment(layout: Layout) -> None:
    """Lines for a shell. No secrets: they stand in a file that only root reads."""
    print(f"export KUBECONFIG={layout.kubeconfig}")
    print(f"export PATH={tools.program('kubectl').parent}:$PATH")
    print(
        f"# S3 http://{HOST}:{S3_PORT} with the credentials of {layout.s3_environment}; Prometheus http://{PROMETHEUS}"
    )


_ACTIONS = {
    "setup": _setup,
    "up": _up,
    "down": _down,
    "status": _status,
    "env": _env,
    "node": _node,
    "component": _component,
    "s3": _s3,
    "load": _load,
    "exec": _exec,
    "tool": _tool,
}

if __name__ == "__main__":
    sys.exit(main())
