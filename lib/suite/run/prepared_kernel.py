"""A kernel forked in advance from a process that has imported the libraries, together with the server of the notebook's
measured processes (see `lib.measure.timing.children`).

jupyter_client starts kernels through a provisioner; `ForkedProvisioner` is its local one with another way to start.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Any

from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from lib.forked_process import ForkedProcess, change_environment, run_to_end
from lib.suite.plan.plan import ROOT
from lib.suite.run.sampling import is_alive

MEASURING_SERVER = "WORKBENCH_MEASURING_SERVER"  # as `lib.measure.timing.children` reads it
INLINE = "module://matplotlib_inline.backend_inline"
LAUNCHER = ["-m", "ipykernel_launcher"]

_WAITING: list[ForkedProcess] = []  # the forked kernel, until it is requested


def prepare() -> None:
    """Fork the process that becomes the kernel, and make jupyter_client use it for the first kernel. A notebook that
    restarts its kernel gets a new process.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        run_to_end(lambda: _wait_for_order(reader))
    os.close(reader)
    _WAITING.append(ForkedProcess(pid, os.fdopen(writer, "w", encoding="utf-8")))
    factory = KernelProvisionerFactory.instance()
    place = f"{__name__}:{ForkedProvisioner.__name__}"
    factory.provisioners["forked"] = EntryPoint("forked", place, "jupyter_client.kernel_provisioners")
    factory.default_provisioner_name = "forked"


class ForkedProvisioner(LocalProvisioner):
    """Starts the prepared kernel; without one, starts a kernel like jupyter_client's own provisioner."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        """Return the kernel's connection info; `cmd` and the variables come from the kernel's description."""
        if not _WAITING or cmd[1:3] != LAUNCHER:
            return await super().launch_kernel(cmd, **kwargs)
        process = _WAITING.pop()
        arguments = [*cmd[3:], f"--IPKernelApp.parent_handle={os.getpid()}"]  # so that it ends when this process does
        order = {"arguments": arguments, "environment": kwargs["env"], "directory": kwargs.get("cwd") or os.getcwd()}
        assert process.stdin is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.close()
        self.process = process  # type: ignore[assignment]
        self.pid = self.pgid = process.pid  # it leads a session of its own
        return self.connection_info


# --- the kernel ------------------------------------------------------------------------------------------------------


def _wait_for_order(reader: int) -> None:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # so that the build's pipe closes when papermill's process ends
    with os.fdopen(reader, encoding="utf-8") as orders:
        line = orders.readline()
    if line:
        order = json.loads(line)
        _become_kernel(order["arguments"], order["environment"], order["directory"])


def _become_kernel(arguments: Sequence[str], environment: Mapping[str, str], directory: str) -> None:
    change_environment(environment)
    os.environ[MEASURING_SERVER] = _fork_measuring_server()
    os.chdir(directory)
    sys.argv = ["ipykernel_launcher", *arguments]
    if matplotlib := sys.modules.get("matplotlib"):  # which was imported before the kernel could name its backend
        matplotlib.rcParams["backend"] = INLINE
    import_module("ipykernel.kernelapp").launch_new_instance(kernel_class=_kernel_class())


def _kernel_class() -> type:
    """Return IPython's kernel, which shuts down as soon as its child processes have ended.

    ipykernel terminates them first and waits until none is listed. An ended child stays listed as a zombie, because
    nothing collects its exit code any more, so a kernel with children would wait until jupyter_client terminates it:
    for 2.5 s, and without running its `atexit` functions.
    """
    from ipykernel.ipkernel import IPythonKernel

    class PreparedKernel(IPythonKernel):
        def _process_children(self) -> list[Any]:
            return [child for child in super()._process_children() if is_alive(child)]

    return PreparedKernel


def _fork_measuring_server() -> str:
    """Fork the server of the measured processes; return its description."""
    to_it, from_it = os.pipe(), os.pipe()
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - for as long as both processes live
    threads = os.environ.get("OMP_NUM_THREADS", "0")
    pid = os.fork()
    if pid == 0:
        for fd in (to_it[1], from_it[0]):
            os.close(fd)
        for number, fd in enumerate((to_it[0], from_it[1], errors.fileno())):
            os.dup2(fd, number)
        os.chdir(ROOT)
        run_to_end(lambda: import_module("lib.measure.timing.child").serve())
    os.close(to_it[0])
    os.close(from_it[1])
    description = [os.getpid(), pid, to_it[1], from_it[0], os.dup(errors.fileno()), threads]
    return ",".join(map(str, description))
