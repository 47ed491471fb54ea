// What the adapter's client does by itself, with an adapter that says what a test has it say.
import assert from "node:assert/strict";
import { test } from "node:test";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { createRouterTransport } from "@connectrpc/connect";
import { Adapter, Code, ConnectError, counter, createClient, gauge, RetinueError } from "retinue/client";
import type { MetricChange } from "retinue/client";
import { AdapterService } from "retinue/adapter/v1/adapter_service_pb";
import type { ReportMetricsRequest, WatchMetricsResponseSchema } from "retinue/adapter/v1/adapter_service_pb";
import { MetricSchema } from "retinue/adapter/v1/metric_pb";

type Told = MessageInitShape<typeof WatchMetricsResponseSchema>[];

const brief = { timeout: 20_000 };

/** Its streams say what stands in the script and break, but for the last: then it refuses. Of reports it refuses one point each. */
function scripted(streams: Told[], signals: number[] = [], reports: ReportMetricsRequest[] = []): Adapter {
  const transport = createRouterTransport(({ service }) => {
    service(AdapterService, {
      async *watchMetrics() {
        const told = streams.shift();
        if (!told) throw new ConnectError("no more", Code.InvalidArgument);
        yield* told;
        if (streams.length > 0) throw new ConnectError("gone", Code.Unavailable);
      },
      async *watchSignals() {
        const value = signals.shift();
        if (value === undefined) throw new ConnectError("no more", Code.NotFound);
        yield { signals: { signals: [{ value: { case: "number", value } }] } };
      },
      reportMetrics(request) {
        reports.push(request);
        const rejections = [{ reason: "negative_counter", points: 1n, example: "the first" }];
        return { acceptedPoints: seriesOf(request) - 1, rejections };
      },
    });
  });
  return new Adapter({ client: createClient(AdapterService, transport) });
}

function seriesOf({ metrics }: ReportMetricsRequest): number {
  return metrics.reduce((count, { series }) => count + series.length, 0);
}

/** What came, until it was refused. */
async function all<T>(items: AsyncIterable<T>): Promise<{ told: T[]; refusal: RetinueError }> {
  const told: T[] = [];
  try {
    for await (const item of items) told.push(item);
  } catch (error) {
    assert.ok(error instanceof RetinueError, String(error));
    return { told, refusal: error };
  }
  return assert.fail("it was not refused");
}

test("a watch begins anew after a break and after an end, and says so", brief, async () => {
  const synced = { synced: true };
  const { told, refusal } = await all(scripted([[{}, synced, { coalesced: 2n }], [synced], [synced]]).watch());
  const shown = told.map(({ begins, synced, coalesced }: MetricChange) => [begins, synced, coalesced]);
  assert.deepEqual(shown, [[true, false, 0n], [false, true, 0n], [false, false, 2n], [true, true, 0n], [true, true, 0n]]);
  assert.equal(refusal.codeName, "INVALID_ARGUMENT");
});

test("a watch of signals goes on until it is refused", brief, async () => {
  const { told, refusal } = await all(scripted([], [1, 2, 3]).watchSignals(["web"]));
  assert.deepEqual(told.map(({ signals }) => signals[0]?.value.value), [1, 2, 3]);
  assert.equal(refusal.codeName, "NOT_FOUND");
});

test("a watch ends with its signal, without an error", brief, async () => {
  const leave = new AbortController();
  let changes = 0;
  for await (const _ of scripted([[{ synced: true }], [{ synced: true }]]).watch([], leave.signal)) {
    changes += 1;
    leave.abort();
  }
  assert.equal(changes, 1);
});

test("reports are not too large and lose nothing", brief, async () => {
  const series = Array.from({ length: 2500 }, (_, row) => gauge("", row, { row: `${row}` }).series).flat();
  const reports: ReportMetricsRequest[] = [];
  const rows = create(MetricSchema, { ...gauge("rows", 0), series });
  const { accepted, rejections } = await scripted([], [], reports).report("own", rows, counter("orders", 17));
  assert.ok(reports.every((report) => seriesOf(report) <= 1000));
  assert.equal(reports.reduce((total, report) => total + seriesOf(report), 0), 2501);
  assert.equal(accepted, 2501 - reports.length);
  assert.deepEqual(rejections.map(({ reason, points }) => [reason, points]), [["negative_counter", BigInt(reports.length)]]);
});
