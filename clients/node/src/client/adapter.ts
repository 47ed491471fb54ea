import { create, toBinary, type MessageInitShape } from "@bufbuild/protobuf";
import { Code, type Client } from "@connectrpc/connect";
import { RetinueError } from "./errors.js";
import { pause } from "./session.js";
import type { AdapterService, MatchSchema, WatchMetricsResponse } from "../retinue/adapter/v1/adapter_service_pb.js";
import { MetricSchema, MetricType, type Metric, type Signals } from "../retinue/adapter/v1/metric_pb.js";
import type { Rejection } from "../retinue/adapter/v1/target_pb.js";

const FIRST_WAIT_MS = 50;
const LONGEST_WAIT_MS = 2_000;
// What one report may have: the contract's limit, and what is safely below gRPC's.
const MOST_SERIES = 1_000;
const MOST_BYTES = 3 * 2 ** 20;

export interface AdapterOptions {
  /** The server. */
  client: Client<typeof AdapterService>;
}

/** A part of a snapshot, or what changed since. */
export interface MetricChange extends WatchMetricsResponse {
  /** A snapshot begins, since the watch did or had to begin anew: forget what was known before. */
  begins: boolean;
}

/** What became of a report. */
export interface Reported {
  /** Points that were taken. */
  accepted: number;
  /** Those that were not, by reason. */
  rejections: Rejection[];
}

/** The adapter, for those who watch what it collects and those who tell it of themselves. What is one call is in the stub. */
export class Adapter {
  readonly #client: Client<typeof AdapterService>;

  constructor(options: AdapterOptions) {
    this.#client = options.client;
  }

  /**
   * Tells of what any of the matches selects, or of all: a snapshot, then each change. When a connection is lost it begins anew,
   * with a snapshot. It ends with the loop or when the signal is aborted; throws RetinueError for what stays.
   */
  async *watch(matches: MessageInitShape<typeof MatchSchema>[] = [], signal?: AbortSignal): AsyncGenerator<MetricChange> {
    let begins = true;
    const open = (signal: AbortSignal) => {
      begins = true;
      return this.#client.watchMetrics({ matches }, { signal });
    };
    for await (const response of resumed(open, signal)) {
      yield Object.assign(response, { begins });
      begins = false;
    }
  }

  /**
   * Tells of the golden signals of these targets or of all, and again whenever one changes; a target that is gone has none. It goes
   * on over lost connections, and ends as `watch` does.
   */
  async *watchSignals(targetIds: string[] = [], signal?: AbortSignal): AsyncGenerator<Signals> {
    for await (const { signals } of resumed((signal) => this.#client.watchSignals({ targetIds }, { signal }), signal)) {
      if (signals) yield signals;
    }
  }

  /**
   * Tells the server what this app says of itself, in as many calls as it takes. A point replaces the one of its series, so that it
   * is safe to repeat; points that are refused keep no others from being taken. Throws RetinueError.
   */
  async report(targetId: string, ...metrics: Metric[]): Promise<Reported> {
    let accepted = 0;
    const refused = new Map<string, Rejection>();
    for (const batch of batches(metrics)) {
      try {
        const response = await this.#client.reportMetrics({ targetId, metrics: batch });
        accepted += response.acceptedPoints;
        for (const one of response.rejections) {
          const known = refused.get(one.reason);
          if (known) known.points += one.points;
          else refused.set(one.reason, one);
        }
      } catch (error) {
        throw RetinueError.from(error);
      }
    }
    return { accepted, rejections: [...refused.values()] };
  }
}

/** A point for a report: what goes up and down. Units such as `ms` or `By` are turned into base units. */
export function gauge(name: string, value: number, labels: Record<string, string> = {}, unit = ""): Metric {
  return point(MetricType.GAUGE, name, value, labels, unit);
}

/** A point for a report: what only grows. The name has no `_total`. */
export function counter(name: string, value: number, labels: Record<string, string> = {}, unit = ""): Metric {
  return point(MetricType.COUNTER, name, value, labels, unit);
}

function point(type: MetricType, name: string, value: number, labels: Record<string, string>, unit: string): Metric {
  return create(MetricSchema, { name, type, unit, series: [{ labels, value: { case: "number", value } }] });
}

/** Reads a stream, and opens it again when it ends or breaks, until the signal is aborted. */
async function* resumed<T>(open: (signal: AbortSignal) => AsyncIterable<T>, signal?: AbortSignal): AsyncGenerator<T> {
  const leave = new AbortController();
  const life = signal ? AbortSignal.any([signal, leave.signal]) : leave.signal;
  let wait = FIRST_WAIT_MS;
  try {
    while (!life.aborted) {
      try {
        for await (const response of open(life)) {
          wait = FIRST_WAIT_MS;
          yield response;
        }
      } catch (error) {
        if (life.aborted) return;
        const refusal = RetinueError.from(error);
        if (refusal.code !== Code.Unavailable && !refusal.retryAfterMs) throw refusal;
      }
      await pause(wait * (0.5 + Math.random() / 2), life);
      wait = Math.min(2 * wait, LONGEST_WAIT_MS);
    }
  } finally {
    leave.abort();
  }
}

/** Reports that are not too large: a metric with many series is told in parts. */
function* batches(metrics: Metric[]): Generator<Metric[]> {
  let batch: Metric[] = [];
  let [series, size] = [0, 0];
  for (const metric of metrics.flatMap(parts)) {
    const length = byteSize(metric);
    if (batch.length > 0 && (series + metric.series.length > MOST_SERIES || size + length > MOST_BYTES)) {
      yield batch;
      [batch, series, size] = [[], 0, 0];
    }
    batch.push(metric);
    series += metric.series.length;
    size += length;
  }
  if (batch.length > 0) yield batch;
}

function parts(metric: Metric): Metric[] {
  const count = metric.series.length;
  if (count <= 1 || (count <= MOST_SERIES && byteSize(metric) <= MOST_BYTES)) return [metric];
  const middle = Math.floor(count / 2);
  const halves = [metric.series.slice(0, middle), metric.series.slice(middle)];
  return halves.flatMap((series) => parts(create(MetricSchema, { ...metric, series })));
}

function byteSize(metric: Metric): number {
  return toBinary(MetricSchema, metric).length;
}
