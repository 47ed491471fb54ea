// The adapter from end to end; prints clients/transcripts/adapter.txt. Give a name of your own to run it twice. It is the app
// that is collected, too: a shop that serves a page of metrics.
// In clients/node, with RETINUE_CONTROL_ADDRESS set to the server's control socket:
// npm ci && npm run build && node dist/examples/adapter.js
import { once } from "node:events";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import { Adapter, connect, counter, createClient, gauge, RetinueError, type Client } from "retinue/client";
import type { MetricChange } from "retinue/client";
import { AdapterService } from "retinue/adapter/v1/adapter_service_pb";
import { MetricType, SignalKind, type Series, type Signal } from "retinue/adapter/v1/metric_pb";
import { TargetKind, TargetState, type Target, type TargetStatus } from "retinue/adapter/v1/target_pb";

type Server = Client<typeof AdapterService>;
type Wanted = { targetId: string; kind: TargetKind; endpoint: string; intervalDuration: { seconds: bigint } };

const INTERVAL_MS = 1_000;
const SECOND = { seconds: 1n };

/** An app with a page in Prometheus' text format. */
const shop = {
  served: 90,
  failed: 10,
  jobs: -3,
  works: true,

  page(): string {
    return `# TYPE http_requests_total counter
http_requests_total{code="200"} ${this.served}
http_requests_total{code="500"} ${this.failed}
# TYPE queue_age_milliseconds gauge
queue_age_milliseconds 1500
# TYPE process_open_fds gauge
process_open_fds 5
# TYPE process_max_fds gauge
process_max_fds 20
# TYPE jobs_total counter
jobs_total ${this.jobs}
`;
  },
};

async function main(name: string): Promise<void> {
  const app = createClient(AdapterService, connect("adapter"));
  const operator = createClient(AdapterService, connect("control"));
  const page = createServer((_, answer) => {
    answer.writeHead(shop.works ? 200 : 500, { "content-type": "text/plain" }).end(shop.works ? shop.page() : "");
  });
  await once(page.listen(0, "127.0.0.1"), "listening");
  const endpoint = `http://127.0.0.1:${(page.address() as AddressInfo).port}/metrics`;
  const wanted = { targetId: name, kind: TargetKind.PROMETHEUS, endpoint, intervalDuration: SECOND };
  await refuse(app, operator, wanted);
  await attempt(operator, wanted);
  shop.jobs = 3;
  await create(operator, wanted);
  await look(app, name);
  const changes = new Adapter({ client: app }).watch([{ name: "http_requests", targetIds: [name] }]);
  await watch(app, changes, name);
  await spoil(app, name);
  await report(app, operator, name);
  await remove(operator, changes, name);
  await changes.return(undefined);
  page.close();
}

async function refuse(app: Server, operator: Server, wanted: Wanted): Promise<void> {
  console.log(`an app declares a target: ${told(await refused(app.createTarget({ target: wanted })))}`);
  const intervalDuration = { nanos: 500_000_000 };
  const nonsense = { targetId: "no spaces, please", kind: TargetKind.REDIS, endpoint: "nowhere", intervalDuration };
  const refusal = await refused(operator.createTarget({ target: nonsense }));
  console.log(`declared nonsense: ${told(refusal)}`);
  for (const path of refusal.fields.map((field) => field.path).sort()) console.log(`  ${path}`);
  const unknown = { ...wanted, kind: TargetKind.JSON, rulePack: "nobody-knows" };
  const missing = await refused(operator.createTarget({ target: unknown }));
  console.log(`declared with a rule pack that nobody knows: ${told(missing)}`);
}

/** A dry run: what comes beside what becomes of it. */
async function attempt(operator: Server, wanted: Wanted): Promise<void> {
  const { points } = await operator.testTarget({ target: wanted });
  console.log(`tried, ${points.length} points:`);
  for (const { raw, normalised, rejection } of points) {
    console.log(`  ${raw} becomes ${bare(normalised) || `nothing: ${rejection}`}`);
  }
  console.log(`nothing is kept of it: ${told(await refused(operator.getTarget(wanted)))}`);
}

async function create(operator: Server, wanted: Wanted): Promise<void> {
  const made = (await operator.createTarget({ target: wanted, waitDuration: { seconds: 10n } })).target!;
  console.log(`created: ${state(made)}, ${made.status?.series} series`);
  const again = (await operator.createTarget({ target: wanted })).target!;
  console.log(`created again: the same: ${again.etag === made.etag}`);
  const target = { ...wanted, service: "shop" };
  console.log(`created with another service: ${told(await refused(operator.createTarget({ target })))}`);
  console.log(`updated under an etag of long ago: ${told(await refused(operator.updateTarget({ target, etag: "0" })))}`);
  const updated = (await operator.updateTarget({ target, etag: made.etag })).target!;
  console.log(`updated: of service ${updated.service}, another etag: ${updated.etag !== made.etag}`);
}

async function look(app: Server, name: string): Promise<void> {
  console.log("its golden signals:");
  for (const signal of await signals(app, name)) console.log(`  ${shown(signal)}`);
  console.log("described:");
  for (const { name: metric, type, unit } of (await app.describeMetrics({ matches: [{ targetIds: [name] }] })).metrics) {
    console.log(`  ${metric}: ${MetricType[type]}${unit && ` in ${unit}`}`);
  }
  const matches = [{ name: "queue_*", targetIds: [name] }];
  const [metric] = (await app.getMetrics({ matches, maxAgeDuration: { seconds: 60n } })).metrics;
  console.log(`read: ${metric!.name} is ${number(metric!.series[0]!)}`);
}

async function watch(app: Server, changes: AsyncGenerator<MetricChange>, name: string): Promise<void> {
  const first = await next(changes);
  console.log(`watched: ${counts(first)}; the snapshot is complete: ${first.synced}`);
  shop.served += 30;
  console.log(`30 more requests, the watch tells: ${counts(await next(changes))}`);
  const [requests] = await signals(app, name);
  console.log(`requests are ${number(requests!)}, their rate is known: ${requests!.rate !== undefined}`);
}

/** A point that makes no sense costs itself, an app that is away nothing of what was collected. */
async function spoil(app: Server, name: string): Promise<void> {
  shop.jobs = -3;
  const [refused] = (await until(app, name, "degraded")).rejections;
  console.log(`a counter below zero: degraded, refused for ${refused!.reason}: ${refused!.points > 0n}`);
  shop.works = false;
  console.log(`the page breaks: stale, ${(await until(app, name, "stale")).message}`);
  console.log(`what was collected stands: ${shown((await signals(app, name))[0]!)}`);
  shop.works = true;
  shop.jobs = 4;
  await until(app, name, "up");
  console.log("it is mended: up");
}

/** What an app tells by itself. */
async function report(app: Server, operator: Server, name: string): Promise<void> {
  const own = `${name}-own`;
  const adapter = new Adapter({ client: app });
  const target = { targetId: own, kind: TargetKind.REPORT, intervalDuration: SECOND, service: "shop" };
  await operator.createTarget({ target });
  const points = [gauge("cart_age", 2500, { kind: "guest" }, "ms"), counter("orders", 17), counter("refunds", -1)];
  const { accepted, rejections } = await adapter.report(own, ...points);
  const reasons = rejections.map(({ reason }) => reason).join(", ");
  console.log(`reported ${points.length} points of our own: ${accepted} taken, refused for ${reasons}`);
  for await (const { metrics } of adapter.watch([{ targetIds: [own] }])) {
    for (const { name: metric, series } of metrics) {
      console.log(`  ${metric} is ${number(series[0]!)}, service ${series[0]!.labels["service"]}`);
    }
    if (metrics.length > 0) break;
  }
  console.log(`reported to a target that is collected: ${told(await refused(adapter.report(name, ...points)))}`);
  await operator.deleteTarget({ targetId: own });
}

async function remove(operator: Server, changes: AsyncGenerator<MetricChange>, name: string): Promise<void> {
  const remove = async () => (await operator.deleteTarget({ targetId: name })).deleted;
  console.log(`deleted: ${await remove()}, again: ${await remove()}`);
  let gone = 0;
  while (gone === 0) {
    gone = (await next(changes)).metrics.flatMap(({ series }) => series).filter(({ stale }) => stale).length;
  }
  console.log(`the watch tells: ${gone} series are gone`);
  console.log(`asked for it: ${told(await refused(operator.getTarget({ targetId: name })))}`);
}

/** Its status, once it is in that state. */
async function until(app: Server, targetId: string, wanted: string): Promise<TargetStatus> {
  for (;;) {
    const { target } = await app.getTarget({ targetId });
    if (state(target!) === wanted) return target!.status!;
    await sleep(INTERVAL_MS / 10);
  }
}

async function signals(app: Server, name: string): Promise<Signal[]> {
  return (await app.getSignals({ targetIds: [name] })).signals[0]!.signals;
}

async function next(changes: AsyncGenerator<MetricChange>): Promise<MetricChange> {
  const { value, done } = await changes.next();
  if (done) throw new Error("the watch has ended");
  return value;
}

function state(target: Target): string {
  return TargetState[target.status!.state].toLowerCase();
}

function number({ value }: Series | Signal): number | undefined {
  return value.case === "number" ? value.value : undefined;
}

/** By the label `code`. */
function counts({ metrics }: MetricChange): string {
  const found = metrics.flatMap(({ series }) => series).map((one) => `${one.labels["code"]} ${number(one)}`);
  return found.sort().join(", ");
}

function shown(signal: Signal): string {
  const kind = SignalKind[signal.kind].toLowerCase();
  return signal.absentReason ? `${kind} absent: ${signal.absentReason}` : `${kind} ${number(signal)} of ${signal.source}`;
}

/** A line of `/metrics` without its labels. */
function bare(sample: string): string {
  return sample.replace(/\{.*\}/, "").trim();
}

async function refused(call: Promise<unknown>): Promise<RetinueError> {
  try {
    await call;
  } catch (error) {
    return RetinueError.from(error);
  }
  throw new Error("it was not refused");
}

function told(refusal: RetinueError): string {
  return `${refusal.codeName} ${refusal.reason}`;
}

await main(process.argv[2] ?? "transcript");
