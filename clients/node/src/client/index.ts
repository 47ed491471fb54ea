/**
 * What the generated stubs leave to every program: where the server is, its errors, the loop of a worker, leadership, both sides of a
 * scatter, what stands behind localhost, and watching and telling the adapter.
 */
export { Ambassador, NotActive, upstream, upstreamAddress } from "./ambassador.js";
export type { AmbassadorOptions, DeclareOptions, LeaveOptions, WaitOptions } from "./ambassador.js";
export { Code, ConnectError, createClient, type Client, type ConnectRouter } from "@connectrpc/connect";
export { Adapter, counter, gauge } from "./adapter.js";
export type { AdapterOptions, MetricChange, Reported } from "./adapter.js";
export { DEFAULT_ADDRESS, address, connect } from "./connection.js";
export { Election, TermLost } from "./election.js";
export type { ElectionEvent, ElectionOptions, Term } from "./election.js";
export { RetinueError, type Field } from "./errors.js";
export { Leaf, type LeafOptions } from "./leaf.js";
export { bytes, json, jsonOf, text } from "./payload.js";
export type { LeafAnswer, LeafContext } from "./queries.js";
export { Answer, Pool, type PoolOptions, type Question } from "./scatter.js";
export { Failure, LeaseLost, Release, Stopping, TaskCancelled, Worker } from "./worker.js";
export type { Handler, Result, WorkerOptions } from "./worker.js";
