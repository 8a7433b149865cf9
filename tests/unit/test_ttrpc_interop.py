"""Our ttRPC against the original: containerd's Go implementation, as client and as server."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from kata.proto.codec import Methods
from kata.proto.health_pb import CheckRequest
from kata.ttrpc import status, sync_client
from kata.ttrpc.client import Client, ConnectionLost, TtrpcError
from kata.ttrpc.server import Context, Server

GO_MOD = """\
module interop

go 1.21

require (
    github.com/containerd/ttrpc v1.2.7
    google.golang.org/grpc v1.64.0
    google.golang.org/protobuf v1.34.2
)
"""

# A StringValue is on the wire what our CheckRequest is: one string with number 1.
MAIN_GO = r"""
package main

import (
    "context"
    "errors"
    "fmt"
    "net"
    "os"
    "strings"
    "sync"
    "time"

    "github.com/containerd/ttrpc"
    "google.golang.org/grpc/codes"
    "google.golang.org/grpc/status"
    "google.golang.org/protobuf/types/known/wrapperspb"
)

func check(ok bool, what string, details ...any) {
    if !ok {
        fmt.Fprintln(os.Stderr, append([]any{what}, details...)...)
        os.Exit(1)
    }
}

func serve(listener net.Listener) {
    server, err := ttrpc.NewServer()
    check(err == nil, "new server", err)
    reply := func(f func(context.Context, string) (string, error)) ttrpc.Method {
        return func(ctx context.Context, unmarshal func(interface{}) error) (interface{}, error) {
            var in wrapperspb.StringValue
            if err := unmarshal(&in); err != nil {
                return nil, err
            }
            out, err := f(ctx, in.Value)
            return wrapperspb.String(out), err
        }
    }
    server.Register("test.Echo", map[string]ttrpc.Method{
        "Echo": reply(func(_ context.Context, in string) (string, error) { return in, nil }),
        "Fail": reply(func(_ context.Context, in string) (string, error) {
            return "", status.Error(codes.NotFound, in)
        }),
        "Block": reply(func(ctx context.Context, _ string) (string, error) {
            <-ctx.Done()
            return "", ctx.Err()
        }),
        "Context": reply(func(ctx context.Context, _ string) (string, error) {
            md, _ := ttrpc.GetMetadata(ctx)
            values, _ := md.Get("key")
            _, timed := ctx.Deadline()
            return fmt.Sprint(values, timed), nil
        }),
    })
    fmt.Println("ready")
    server.Serve(context.Background(), listener)
}

func call(client *ttrpc.Client, ctx context.Context, method, text string) (string, error) {
    var out wrapperspb.StringValue
    err := client.Call(ctx, "test.Echo", method, wrapperspb.String(text), &out)
    return out.Value, err
}

func main() {
    if os.Args[1] == "server" {
        listener, err := net.Listen("unix", os.Args[2])
        check(err == nil, "listen", err)
        serve(listener)
        return
    }
    conn, err := net.Dial("unix", os.Args[2])
    check(err == nil, "dial", err)
    client := ttrpc.NewClient(conn)
    ctx := context.Background()

    blocked, cancel := context.WithCancel(ctx)
    held := make(chan error)
    go func() { _, err := call(client, blocked, "Block", ""); held <- err }()
    var group sync.WaitGroup
    for i := 0; i < 200; i++ {
        group.Add(1)
        go func(text string) {
            defer group.Done()
            out, err := call(client, ctx, "Echo", text)
            check(err == nil && out == text, "echo", out, err)
        }(fmt.Sprint(i))
    }
    group.Wait()
    cancel()
    check(errors.Is(<-held, context.Canceled), "the blocked call was not cancelled")

    big := strings.Repeat("x", 4000000)
    out, err := call(client, ctx, "Echo", big)
    check(err == nil && out == big, "big", err)
    _, err = call(client, ctx, "Fail", "thing")
    s, _ := status.FromError(err)
    check(s.Code() == codes.NotFound && s.Message() == "no thing", "fail", err)
    _, err = call(client, ctx, "Nope", "")
    check(status.Code(err) == codes.Unimplemented, "nope", err)
    timed, stop := context.WithTimeout(ctx, time.Minute)
    defer stop()
    out, err = call(client, ttrpc.WithMetadata(timed, ttrpc.MD{"key": {"a", "b"}}), "Context", "")
    check(err == nil && out == "['a', 'b'] True", "context", out, err)
    short, stop := context.WithTimeout(ctx, 50*time.Millisecond)
    defer stop()
    _, err = call(client, short, "Block", "")
    check(err != nil, "the deadline did not end the call")
    fmt.Println("passed")
}
"""

SERVICE = "test.Echo"


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Go program."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("needs Go (tools/setup test puts it into .venv)")
    directory = tmp_path_factory.mktemp("interop")
    (directory / "go.mod").write_text(GO_MOD)
    (directory / "main.go").write_text(MAIN_GO)
    environment = {**os.environ, "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", "CGO_ENABLED": "0"}
    fetched = subprocess.run(
        [go, "mod", "tidy"], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    if fetched.returncode:
        pytest.skip(f"needs Go modules, which cannot be downloaded: {fetched.stderr.strip()[-100:]}")
    subprocess.run([go, "build", "-p", "2", "-o", "peer", "."], cwd=directory, env=environment, check=True)
    return directory / "peer"


class Echo:
    async def Echo(self, request: CheckRequest, context: Context) -> CheckRequest:
        return request

    async def Fail(self, request: CheckRequest, context: Context) -> CheckRequest:
        raise TtrpcError(status.NOT_FOUND, f"no {request.service}")

    async def Block(self, request: CheckRequest, context: Context) -> CheckRequest:
        await asyncio.Event().wait()
        return request

    async def Context(self, request: CheckRequest, context: Context) -> CheckRequest:
        timed = context.deadline is not None
        return CheckRequest(service=f"{context.metadata['key']} {timed}")


def test_a_go_client_and_our_server(peer: Path, tmp_path: Path) -> None:
    async def main() -> None:
        table = Methods(
            dict.fromkeys(("Echo", "Fail", "Block", "Context"), "@health.CheckRequest @health.CheckRequest")
        )
        errors: list[Exception] = []
        server = Server({SERVICE: (table, Echo())}, lambda context, error: errors.append(error))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "s"))
        await server.start(listener)
        client = await asyncio.create_subprocess_exec(
            peer, "client", tmp_path / "s", stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        output, complaint = await client.communicate()
        await server.shutdown()
        # Of a call whose answer and whose own deadline cross, Go's client logs that it no longer knows it.
        others = [
            line for line in complaint.splitlines() if b"received message on inactive stream" not in line
        ]
        assert (output, others) == (b"passed\n", [])
        assert errors == []

    asyncio.run(main())


def test_our_clients_and_a_go_server(peer: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    server = subprocess.Popen([peer, "server", path], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        asyncio.run(calls(path, server))
    finally:
        server.kill()
        server.communicate()


async def calls(path: str, server: subprocess.Popen[bytes]) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    client = await Client.connect(sock)

    async def call(method: str, text: str = "", timeout: float | None = None) -> str:
        request = CheckRequest(service=text)
        return (await client.call(SERVICE, method, request, CheckRequest, timeout, {"key": "value"})).service

    held = asyncio.create_task(call("Block"))
    texts = [str(i) for i in range(200)]
    assert await asyncio.gather(*(call("Echo", text) for text in texts)) == texts
    assert await call("Echo", "x" * 4_000_000) == "x" * 4_000_000
    assert await call("Context") == "[value] false"
    assert await call("Context", timeout=60) == "[value] true"
    with pytest.raises(TtrpcError) as caught:
        await call("Fail", "thing")
    assert (caught.value.code, caught.value.message) == (status.NOT_FOUND, "thing")
    with pytest.raises(TtrpcError) as caught:
        await call("Nope")
    assert caught.value.code == status.UNIMPLEMENTED
    with pytest.raises(TtrpcError) as caught:
        await call("Block", timeout=0.05)
    assert caught.value.code == status.DEADLINE_EXCEEDED

    with await asyncio.to_thread(sync_client.connect, path) as other:
        for text in ("a", "x" * 4_000_000):
            assert other.call(SERVICE, "Echo", CheckRequest(service=text), CheckRequest).service == text
        with pytest.raises(TtrpcError) as caught:
            other.call(SERVICE, "Fail", CheckRequest(service="b"), CheckRequest)
        assert caught.value.code == status.NOT_FOUND

    server.kill()
    with pytest.raises(ConnectionLost):
        await held
