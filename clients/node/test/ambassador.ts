// The ambassador against a real server that has Envoy and may dial loopback: RETINUE_ADDRESS is where apps dial it,
// RETINUE_CONTROL_ADDRESS where operators do.
import assert from "node:assert/strict";
import { once } from "node:events";
import * as http from "node:http";
import * as net from "node:net";
import { after, test, type TestContext } from "node:test";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { address, Ambassador, Code, connect, createClient, NotActive, RetinueError } from "retinue/client";
import { upstream, upstreamAddress } from "retinue/client";
import { AmbassadorService } from "retinue/ambassador/v1/ambassador_service_pb";
import { Protocol, UpstreamState, type Upstream } from "retinue/ambassador/v1/upstream_pb";

process.env["RETINUE_CONTROL_ADDRESS"] ?? assert.fail("cannot test: set RETINUE_ADDRESS and RETINUE_CONTROL_ADDRESS");
const brief = { timeout: 30_000 };
const app = new Ambassador({ client: createClient(AmbassadorService, connect("ambassador")) });
const operator = new Ambassador({ client: createClient(AmbassadorService, connect("control")) });

/** An upstream's name; it is gone after the test. */
function named(t: TestContext): string {
  const upstreamId = `node-${process.hrtime.bigint()}`;
  t.after(() => operator.remove(upstreamId, { drainMs: 0 }));
  return upstreamId;
}

async function listening(server: net.Server): Promise<string> {
  await once(server.listen(0, "127.0.0.1"), "listening");
  after(() => server.close());
  return `127.0.0.1:${(server.address() as net.AddressInfo).port}`;
}

/** A server that answers what it gets with its name before it. */
function echo(name: string): Promise<string> {
  const answer = (socket: net.Socket) => socket.on("error", () => {}).on("data", (data) => socket.write(`${name} ${data}`));
  return listening(net.createServer(answer));
}

/** A declaration over such a server. */
async function tcp(upstreamId: string, name = "one") {
  return upstream(upstreamId, Protocol.TCP, [await echo(name)]);
}

/** Of an upstream of which nobody is known. */
function unserved(upstreamId: string) {
  return { upstreamId, protocol: Protocol.TCP, discovery: { case: "file" as const, value: { path: "/nonexistent" } } };
}

async function say({ status }: Upstream, text: string): Promise<string> {
  const [host, port] = status!.address.split(":");
  const socket = net.connect(Number(port), host);
  socket.write(text);
  const [answer] = (await once(socket, "data")) as [Buffer];
  socket.destroy();
  return answer.toString();
}

async function refused(call: Promise<unknown>): Promise<RetinueError> {
  const error = await call.then(() => assert.fail("it was not refused"), (error: unknown) => error);
  assert.ok(error instanceof RetinueError, String(error));
  return error;
}

test("a declared upstream is served, found, listed and counted", brief, async (t) => {
  const upstreamId = named(t);
  const declared = await operator.declare(await tcp(upstreamId), { waitMs: 20_000 });
  assert.equal(declared.status?.state, UpstreamState.ACTIVE);
  assert.equal(await say(declared, "x"), "one x");
  assert.equal((await app.get(upstreamId)).etag, declared.etag);
  const listed: string[] = [];
  for await (const found of app.list()) listed.push(found.upstreamId);
  assert.equal(listed.filter((one) => one === upstreamId).length, 1);
  for await (const [stats] of app.stats([upstreamId], { intervalMs: 100 })) if (stats?.requests === 1n) break;
});

test("the data planes tell what they can", brief, async () => {
  const can = (await app.dataPlanes()).flatMap(({ capabilities }) => capabilities);
  const ketama = "policy.load_balancing.balancer=KETAMA";
  assert.ok(can.some(({ protocol, name }) => protocol === Protocol.MEMCACHED && name === ketama));
});

test("a refused declaration says why", brief, async (t) => {
  const upstreamId = named(t);
  const forbidden = await refused(operator.declare(upstream(upstreamId, Protocol.TCP, ["169.254.169.254:80"])));
  assert.deepEqual([forbidden.code, forbidden.reason], [Code.PermissionDenied, "ENDPOINT_FORBIDDEN"]);
  assert.equal(forbidden.metadata["address"], "169.254.169.254:80");
  const wrong = await refused(operator.declare(upstream(upstreamId, Protocol.TCP, ["example.com:80"])));
  assert.deepEqual(wrong.fields.map(({ path }) => path), ["upstream.static.endpoints[0].address"]);
  const { etag } = await operator.declare(await tcp(upstreamId));
  const stale = await refused(operator.declare(await tcp(upstreamId, "two"), { etag: "none" }));
  assert.deepEqual([stale.reason, stale.metadata], ["STALE_ETAG", { etag }]);
});

test("a declaration that is only checked declares nothing", brief, async (t) => {
  const upstreamId = named(t);
  await operator.declare(await tcp(upstreamId), { validateOnly: true });
  assert.equal((await refused(app.get(upstreamId))).reason, "UPSTREAM_NOT_FOUND");
});

test("pushed endpoints serve once they are set", brief, async (t) => {
  const upstreamId = named(t);
  const pushed = { upstreamId, protocol: Protocol.TCP, discovery: { case: "pushed" as const, value: {} } };
  await operator.declare(pushed, { waitMs: 20_000 });
  await operator.setEndpoints(upstreamId, [{ address: await echo("one") }]);
  const found = await operator.declare(pushed, { waitMs: 20_000 }); // which waits until they serve
  assert.equal(await say(found, "x"), "one x");
});

test("to wait ends when all are active", brief, async (t) => {
  const upstreamId = named(t);
  const waiting = app.wait([upstreamId], { timeoutMs: 20_000 });
  await operator.declare(await tcp(upstreamId));
  await waiting;
  await app.wait([]);
});

test("to wait says of each why it is not active", brief, async (t) => {
  const upstreamId = named(t);
  await operator.declare(unserved(upstreamId));
  await assert.rejects(app.wait([upstreamId, "nowhere"], { timeoutMs: 5_000 }), (error) => {
    assert.ok(error instanceof NotActive, String(error));
    assert.deepEqual(error.reasons, { [upstreamId]: "it is pending, and nobody serves it yet", nowhere: "it is not declared" });
    return true;
  });
});

test("to wait for a server that is away ends in time, or when it is aborted", brief, async () => {
  const away = new Ambassador({ client: createClient(AmbassadorService, createGrpcTransport({ baseUrl: "http://127.0.0.1:1" })) });
  const late = { name: "NotActive", message: "db: the ambassador can't be reached" };
  await assert.rejects(away.wait(["db"], { timeoutMs: 300 }), late);
  await assert.rejects(away.wait(["db"], { signal: AbortSignal.abort("enough") }), { ...late, cause: "enough" });
});

test("a watch goes on when its connection is cut", brief, async (t) => {
  const links = new Set<net.Socket>();
  const [host, port] = address("ambassador").split(":");
  const relay = net.createServer((near) => {
    const far = net.connect(Number(port), host);
    links.add(near.on("error", () => {}).on("close", () => far.destroy()));
    near.pipe(far.on("error", () => {})).pipe(near);
  });
  const baseUrl = `http://${await listening(relay)}`;
  const watching = new Ambassador({ client: createClient(AmbassadorService, createGrpcTransport({ baseUrl })) });
  let snapshots = 0;
  for await (const event of watching.watch([named(t)])) {
    if (event.case !== "synced") continue;
    if (++snapshots === 3) break;
    for (const link of links) link.destroy();
  }
  for (const link of links) link.destroy();
});

test("what is refused or aborted ends a stream", brief, async (t) => {
  const drained = async (stream: AsyncIterable<unknown>) => {
    for await (const _ of stream) assert.fail("it gave something");
  };
  assert.equal((await refused(drained(app.stats([named(t)])))).reason, "UPSTREAM_NOT_FOUND");
  assert.equal((await refused(drained(app.watch([], AbortSignal.abort())))).code, Code.Canceled);
});

test("a drained upstream is removed once", brief, async (t) => {
  const upstreamId = named(t);
  const { status } = await operator.declare(await tcp(upstreamId), { waitMs: 20_000 });
  const drained = await operator.drain(upstreamId, { drainMs: 1_000, waitMs: 20_000 });
  assert.equal(drained.status?.state, UpstreamState.DRAINING);
  await assert.rejects(once(net.connect(Number(status?.address.split(":")[1]), "127.0.0.1"), "connect"), { code: "ECONNREFUSED" });
  assert.equal(await operator.remove(upstreamId, { drainMs: 0 }), true);
  for await (const event of app.watch([upstreamId])) if (event.case !== "upstream") break; // it is gone, or was not there any more
  assert.equal(await operator.remove(upstreamId), false);
});

test("an invoked request arrives as it was, and its answer comes back", brief, async (t) => {
  const upstreamId = named(t);
  const web = http.createServer(async (request, response) => {
    let body = "";
    for await (const piece of request.setEncoding("utf8")) body += piece;
    response.writeHead(request.url === "/gone" ? 204 : 418, { "x-two": ["a", "b"] });
    response.end(request.url === "/gone" ? undefined : `${request.method} ${request.url} ${request.headers["x-one"]} ${body}`);
  });
  await operator.declare(upstream(upstreamId, Protocol.HTTP, [await listening(web)]), { waitMs: 20_000 });
  const init = { method: "POST", headers: { "x-one": "1" }, body: "body" };
  const answer = await app.invoke(upstreamId, "/a?b=%20c", init);
  assert.deepEqual([answer.status, answer.headers.get("x-two")], [418, "a, b"]);
  assert.equal(await answer.text(), "POST /a?b=%20c 1 body");
  assert.equal((await app.invoke(upstreamId, "/gone")).status, 204);
  assert.equal((await refused(app.invoke("nowhere", "/", init))).reason, "UPSTREAM_NOT_FOUND");
});

test("the environment names an upstream", () => {
  process.env["RETINUE_UPSTREAM_DB_EU_ADDRESS"] = "127.0.0.1:5432";
  assert.deepEqual([upstreamAddress("db-eu"), upstreamAddress("db")], ["127.0.0.1:5432", undefined]);
});
