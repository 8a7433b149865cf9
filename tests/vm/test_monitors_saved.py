"""Machines that are saved and go on: what every hypervisor that can do so has to do alike."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
from pathlib import Path

import pytest
from agent_support import spec, storages
from hypervisor_lab import Lab, agent_of, lab_fixture, right_clock, said_by  # noqa: F401 - a fixture
from waiting import PATIENCE

from kata.errors import HypervisorError, KataError
from kata.proto import agent_pb, oci_pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.hypervisor.protocols import Machine

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(600)]


def test_a_saved_machine_goes_on_where_it_was(lab: Lab) -> None:
    if not lab.can().snapshot:
        pytest.skip(f"{lab.monitor.title} cannot save a machine")
    place = lab.directory / "saved"
    place.mkdir(parents=True)

    async def scenario() -> None:
        async with lab.machine() as machine, agent_of(machine) as agent:
            await asyncio.wait_for(machine.confined(), PATIENCE)
            await agent.create_container(
                agent_pb.CreateContainerRequest(
                    container_id="kept",
                    OCI=spec("kept", "sleep", "100000"),
                    storages=storages("kept", lab.disks[0]),
                )
            )
            await agent.start_container("kept")
            with pytest.raises(KataError, match="no directory"):
                await machine.save(str(lab.directory / "none"))
            with pytest.raises(HypervisorError):
                await machine.save(str(place))  # it runs
            assert os.listdir(place) == []
            await machine.pause()
            await machine.save(str(place))
            with pytest.raises(HypervisorError, match="already"):
                await machine.save(str(place))
            await machine.resume()
            # Connections may have ended with it (Firecracker's do); the guest has not.
            if machine.channel.is_single:
                await agent.check(PATIENCE)
            else:
                async with agent_of(machine) as another:
                    await another.check(PATIENCE)
        for _ in range(2):  # what was saved can be used again
            async with lab.machine(saved=str(place)) as machine, agent_of(machine) as agent:
                await asyncio.wait_for(machine.confined(), PATIENCE)
                await right_clock(agent)
                process = oci_pb.Process(
                    Args=["sh", "-c", "cat /proc/1/comm; exit 3"], Cwd="/", Env=["PATH=/bin"]
                )
                await agent.exec_process("kept", "again", process)
                assert await agent.wait("kept", "again") == 3
                assert await agent.read("kept", "again", "stdout", 100) == b"sleep\n"
                await machine.pause()
                await machine.resume()
                await agent.check(PATIENCE)
        # What is not all there, or had other devices, is refused by name.
        rootfs, lab.rootfs = lab.rootfs, "/no/such/image"
        with pytest.raises(HypervisorError, match="/no/such/image"):
            async with lab.machine(saved=str(place)):
                pass
        lab.rootfs = rootfs
        max(place.iterdir(), key=lambda file: file.stat().st_size).unlink()
        with pytest.raises(HypervisorError, match="saved in"):
            async with lab.machine(saved=str(place)) as machine:
                await machine.confined()
        (place / "machine.json").unlink()
        with pytest.raises(HypervisorError, match="no machine was saved in"):
            async with lab.machine(saved=str(place)):
                pass

    lab.apart(scenario)


def test_clones_share_what_was_saved_and_cannot_change_it(lab: Lab) -> None:
    """Two at once go on from one machine that was started to be saved, whose agent nobody is connected to."""
    if not lab.can().clones:
        pytest.skip(f"machines of {lab.monitor.title} are not cloned")
    place = lab.directory / "template"
    place.mkdir(parents=True)

    def content() -> dict[str, str]:
        return {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in place.iterdir()
            if file.name != "machine.json"
        }

    def writable(machine: Machine) -> list[str]:
        """Files of what was saved that the monitor could write."""
        found = []
        for number in os.listdir(f"/proc/{machine.pid}/fd"):
            info = Path(f"/proc/{machine.pid}/fdinfo/{number}").read_text()
            flags = int(info.partition("flags:")[2].split()[0], 8)
            path = os.readlink(f"/proc/{machine.pid}/fd/{number}")
            if path.startswith(str(place)) and flags & os.O_ACCMODE != os.O_RDONLY:
                found.append(path)
        maps = Path(f"/proc/{machine.pid}/maps").read_text().splitlines()
        return found + [line for line in maps if str(place) in line and "s" in line.split()[1]]

    async def clone(number: int) -> str:
        lab_name = f"clone{number}"
        async with contextlib.AsyncExitStack() as stack:
            # The monitors of one process have one user, who may open nothing more once the first of them has started.
            async with starting:
                machine = await stack.enter_async_context(lab.machine(saved=str(place), name=lab_name))
                await asyncio.wait_for(machine.confined(), PATIENCE)
            agent = await stack.enter_async_context(agent_of(machine))
            await agent.reseed(os.urandom(512))
            script = (
                "head -c 60000000 /dev/zero >/much; rm /much; cat /proc/sys/kernel/random/boot_id;"
                " head -c 8 /dev/urandom | md5sum"
            )
            said = await said_by(agent, lab_name, script, storages(lab_name, lab.disks[0]))
            assert writable(machine) == []
            assert not re.search("[Ff]ailed|error", machine.console_tail())
            return said

    starting = asyncio.Lock()

    async def scenario() -> None:
        async with lab.machine(saves_into=str(place)) as machine:
            async with agent_of(machine):
                await asyncio.wait_for(machine.confined(), PATIENCE)
            await asyncio.sleep(0.3)
            await machine.pause()
            await machine.save(str(place))
        before = content()
        assert before
        said = await asyncio.gather(clone(1), clone(2))
        assert len({*said[0].splitlines(), *said[1].splitlines()}) == 4, said
        assert content() == before

    lab.apart(scenario)
