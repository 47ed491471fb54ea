import type { MessageInitShape } from "@bufbuild/protobuf";
import { durationFromMs } from "@bufbuild/protobuf/wkt";
import { Code, type CallOptions, type Client } from "@connectrpc/connect";
import { RetinueError } from "./errors.js";
import { pause } from "./session.js";
import type {
  AmbassadorService,
  DataPlane,
  WatchUpstreamsResponse,
} from "../retinue/ambassador/v1/ambassador_service_pb.js";
import type { UpstreamStats } from "../retinue/ambassador/v1/stats_pb.js";
import { UpstreamState } from "../retinue/ambassador/v1/upstream_pb.js";
import type { EndpointSchema, Protocol, Upstream, UpstreamSchema } from "../retinue/ambassador/v1/upstream_pb.js";

const [FIRST_WAIT_MS, LONGEST_WAIT_MS] = [50, 2_000];
const WITHOUT_BODY = new Set([204, 205, 304]);
const NOT_DECLARED = "it is not declared";

export interface AmbassadorOptions {
  /** The server. What changes something is for operators, and needs the control socket: `connect("control")`. */
  client: Client<typeof AmbassadorService>;
}

export interface DeclareOptions extends CallOptions {
  /** The declaration counts only while the upstream has this etag; `none` = only if there is no such upstream. */
  etag?: string;
  /** Only checks it. */
  validateOnly?: boolean;
  /** How long to wait until it is ACTIVE or REJECTED, up to 60 s; what is answered says which. */
  waitMs?: number;
}

export interface LeaveOptions extends CallOptions {
  /** After which open connections are cut, by default 30 s; 0 = now. */
  drainMs?: number;
}

export interface WaitOptions {
  /** By default for as long as it takes. */
  timeoutMs?: number;
  signal?: AbortSignal;
}

/** Upstreams were not ACTIVE in time; `reasons` says of each why not. */
export class NotActive extends Error {
  override readonly name = "NotActive";

  constructor(
    readonly reasons: Record<string, string>,
    options?: ErrorOptions,
  ) {
    super(Object.entries(reasons).map(([upstreamId, why]) => `${upstreamId}: ${why}`).join("; "), options);
  }
}

/** Where an upstream is dialled, 127.0.0.1:PORT or unix:PATH, by RETINUE_UPSTREAM_<NAME>_ADDRESS; undefined if that is not set. */
export function upstreamAddress(upstreamId: string): string | undefined {
  return process.env[`RETINUE_UPSTREAM_${upstreamId.toUpperCase().replaceAll("-", "_")}_ADDRESS`] || undefined;
}

/** A plain declaration: IP:PORT endpoints, and the local port (0 = a free one). */
export function upstream(upstreamId: string, protocol: Protocol, endpoints: string[], port = 0) {
  return {
    upstreamId,
    protocol,
    listen: { address: { case: "port", value: port } },
    discovery: { case: "static", value: { endpoints: endpoints.map((address) => ({ address })) } },
  } satisfies MessageInitShape<typeof UpstreamSchema>;
}

/** What stands behind localhost: declared, looked at, and waited for. Methods throw RetinueError. */
export class Ambassador {
  readonly #client: Client<typeof AmbassadorService>;

  constructor({ client }: AmbassadorOptions) {
    this.#client = client;
  }

  // Changing

  /** Makes it so. Repeating it is safe. */
  async declare(wanted: MessageInitShape<typeof UpstreamSchema>, options: DeclareOptions = {}): Promise<Upstream> {
    const { etag, validateOnly, waitMs, ...call } = options;
    const request = { upstream: wanted, etag, validateOnly, waitDuration: duration(waitMs) };
    return (await called(this.#client.declareUpstream(request, call))).upstream!;
  }

  /** Says who serves an upstream whose discovery is `pushed`. */
  async setEndpoints(
    upstreamId: string,
    endpoints: MessageInitShape<typeof EndpointSchema>[],
    { etag, ...call }: Pick<DeclareOptions, "etag"> & CallOptions = {},
  ): Promise<Upstream> {
    return (await called(this.#client.setEndpoints({ upstreamId, endpoints, etag }, call))).upstream!;
  }

  /** Lets it take no new connections, and the open ones end; waits for the last, up to 60 s. */
  async drain(upstreamId: string, options: LeaveOptions & Pick<DeclareOptions, "waitMs"> = {}): Promise<Upstream> {
    const { drainMs, waitMs, ...call } = options;
    const request = { upstreamId, drainDuration: duration(drainMs), waitDuration: duration(waitMs) };
    return (await called(this.#client.drainUpstream(request, call))).upstream!;
  }

  /** Drains it and forgets it; gives whether there was one. */
  async remove(upstreamId: string, options: LeaveOptions & Pick<DeclareOptions, "etag"> = {}): Promise<boolean> {
    const { drainMs, etag, ...call } = options;
    const request = { upstreamId, drainDuration: duration(drainMs), etag };
    return (await called(this.#client.removeUpstream(request, call))).removed;
  }

  // Looking

  /** As it is now. */
  async get(upstreamId: string, call?: CallOptions): Promise<Upstream> {
    return (await called(this.#client.getUpstream({ upstreamId }, call))).upstream!;
  }

  /** All, by name. */
  async *list(call?: CallOptions): AsyncGenerator<Upstream> {
    let pageToken = "";
    do {
      const page = await called(this.#client.listUpstreams({ pageToken }, call));
      yield* page.upstreams;
      pageToken = page.nextPageToken;
    } while (pageToken);
  }

  /** What carries the bytes, and what it can do. */
  async dataPlanes(call?: CallOptions): Promise<DataPlane[]> {
    return (await called(this.#client.getDataPlane({}, call))).dataPlanes;
  }

  /**
   * These or all as they are, `synced`, then each change, until the signal is aborted. Begins anew when a connection is lost.
   */
  async *watch(upstreamIds: string[] = [], signal?: AbortSignal): AsyncGenerator<WatchUpstreamsResponse["event"]> {
    const responses = again((call) => this.#client.watchUpstreams({ upstreamIds }, call), signal);
    for await (const { event } of responses) yield event;
  }

  /**
   * The counts of these or all, at once and then at an interval, by default 1 s, until the signal is aborted. Goes on over lost
   * connections.
   */
  async *stats(
    upstreamIds: string[] = [],
    { intervalMs, signal }: { intervalMs?: number; signal?: AbortSignal } = {},
  ): AsyncGenerator<UpstreamStats[]> {
    const request = { upstreamIds, intervalDuration: duration(intervalMs) };
    const responses = again((call) => this.#client.watchUpstreamStats(request, call), signal);
    for await (const { stats } of responses) yield stats;
  }

  /**
   * Ends when all of these are ACTIVE; one that is not declared yet is waited for, and so is a server that is away. Throws
   * NotActive when the time is over or the signal is aborted.
   */
  async wait(upstreamIds: string[], { timeoutMs, signal }: WaitOptions = {}): Promise<void> {
    if (upstreamIds.length === 0) return;
    const over = new AbortController();
    const end = () => over.abort(signal?.reason);
    const late = timeoutMs === undefined ? undefined : setTimeout(end, timeoutMs);
    signal?.addEventListener("abort", end);
    if (signal?.aborted) end();
    const waiting = new Waiting(upstreamIds);
    try {
      for await (const event of this.watch(upstreamIds, over.signal)) {
        waiting.hear(event);
        if (waiting.left.size === 0) return;
      }
    } catch (error) {
      if (!over.signal.aborted) throw error;
      throw new NotActive(Object.fromEntries(waiting.left), { cause: over.signal.reason });
    } finally {
      clearTimeout(late);
      signal?.removeEventListener("abort", end);
    }
  }

  // Calling

  /**
   * Makes one HTTP request by the upstream's own listener, as fetch would, for those who have nothing but this client. Whatever
   * the upstream answers is an answer.
   */
  async invoke(upstreamId: string, path = "/", init: RequestInit = {}): Promise<Response> {
    const asked = new Request(`http://${upstreamId}/`, init);
    const request = {
      upstreamId,
      path,
      method: asked.method,
      headers: [...asked.headers].map(([name, value]) => ({ name, value })),
      body: new Uint8Array(await asked.arrayBuffer()),
    };
    const { status, headers, body } = await called(this.#client.invoke(request, { signal: asked.signal }));
    return new Response(WITHOUT_BODY.has(status) ? null : body, {
      status,
      headers: headers.map(({ name, value }): [string, string] => [name, value]),
    });
  }
}

/** What a wait has heard. */
class Waiting {
  /** Of each that is not active: why. */
  readonly left: Map<string, string>;
  readonly #told = new Set<string>(); // those of the present snapshot

  constructor(readonly upstreamIds: string[]) {
    this.left = new Map(upstreamIds.map((upstreamId) => [upstreamId, "the ambassador can't be reached"]));
  }

  hear(event: WatchUpstreamsResponse["event"]): void {
    if (event.case === "upstream") {
      this.#told.add(event.value.upstreamId);
      this.#set(event.value.upstreamId, whyNotActive(event.value));
    } else if (event.case === "removedUpstreamId") {
      this.#set(event.value, NOT_DECLARED);
    } else if (event.case === "synced") {
      for (const upstreamId of this.upstreamIds) if (!this.#told.has(upstreamId)) this.#set(upstreamId, NOT_DECLARED);
      this.#told.clear();
    }
  }

  #set(upstreamId: string, why: string): void {
    if (why) this.left.set(upstreamId, why);
    else this.left.delete(upstreamId);
  }
}

/** Empty if the latest of it is served. */
function whyNotActive({ status }: Upstream): string {
  if (status?.rejection) return `it is refused: ${status.rejection.message}`;
  if (status?.state === UpstreamState.ACTIVE) return "";
  const state = UpstreamState[status?.state ?? UpstreamState.UNSPECIFIED].toLowerCase();
  return `it is ${state}${status?.endpointsResolved ? "" : ", and nobody serves it yet"}`;
}

/** Gives what a stream gives, and opens another one after each that is lost. Who leaves the loop ends it. */
async function* again<T>(open: (call: CallOptions) => AsyncIterable<T>, signal?: AbortSignal): AsyncGenerator<T> {
  const call = new AbortController(); // a client's stream goes on when its loop is left
  const abort = () => call.abort(signal?.reason);
  signal?.addEventListener("abort", abort);
  if (signal?.aborted) abort();
  try {
    for (let wait = FIRST_WAIT_MS; ; wait = Math.min(2 * wait, LONGEST_WAIT_MS)) {
      try {
        for await (const response of open({ signal: call.signal })) {
          yield response;
          wait = FIRST_WAIT_MS;
        }
      } catch (error) {
        const lost = RetinueError.from(error);
        if (call.signal.aborted || !isPassing(lost)) throw lost;
      }
      await pause(wait * (0.5 + Math.random() / 2), call.signal);
    }
  } finally {
    signal?.removeEventListener("abort", abort);
    abort();
  }
}

/** Whether another stream may fare better: a cut connection has many codes, but no reason. */
function isPassing(lost: RetinueError): boolean {
  return lost.code === Code.Unavailable || lost.retryAfterMs > 0 || (lost.reason === "" && !lost.permanent);
}

async function called<T>(call: Promise<T>): Promise<T> {
  try {
    return await call;
  } catch (error) {
    throw RetinueError.from(error);
  }
}

function duration(ms: number | undefined) {
  return ms === undefined ? undefined : durationFromMs(ms);
}
