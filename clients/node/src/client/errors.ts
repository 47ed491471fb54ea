import { durationMs } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError } from "@connectrpc/connect";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "../google/rpc/error_details_pb.js";
import { ScatterFailureSchema, type ScatterFailure } from "../retinue/scattergather/v1/scattergather_service_pb.js";
import type { ItemStatus } from "../retinue/workqueue/v1/task_pb.js";

/** One field that is wrong, and what would be right. */
export interface Field {
  path: string;
  description: string;
}

/** What a server answered, or how one item of a batch went. */
export class RetinueError extends Error {
  override readonly name = "RetinueError";

  constructor(
    message: string,
    /** The canonical code. */
    readonly code: Code,
    /** A retinue.error.v1.ErrorReason without its prefix, such as LEASE_LOST; empty if the error is not Retinue's. */
    readonly reason: string = "",
    /** Belongs to the reason. */
    readonly metadata: Record<string, string> = {},
    /** The fields that are wrong, after INVALID_ARGUMENT. */
    readonly fields: Field[] = [],
    /** When trying again is worth it, in milliseconds; 0 = the server did not say that it is. */
    readonly retryAfterMs: number = 0,
    /**
     * How much had answered, and which shards are missing, of a scatter that failed although leaves were asked; undefined of
     * others.
     */
    readonly missing?: ScatterFailure,
  ) {
    super(message);
  }

  /** The code as the contract spells it: NOT_FOUND. */
  get codeName(): string {
    if (this.code === Code.Canceled) return "CANCELLED";
    return Code[this.code].replace(/(?<=[a-z])(?=[A-Z])/g, "_").toUpperCase();
  }

  /** Whether the same call fails until somebody changes something. */
  get permanent(): boolean {
    return PERMANENT.has(this.code);
  }

  /**
   * Whether the same item may be taken soon without anybody doing anything. A cut connection and a message that can't be
   * sent look alike; the latter does not pass, and so a few tries must do.
   */
  passing(tries: number): boolean {
    if (this.code === Code.Unknown || this.code === Code.Internal) return tries < 5;
    return PASSING.has(this.code) || this.reason === "DISK_FULL" || this.reason === "CONCURRENCY_LIMIT";
  }

  /** Whether the lease ended, so that nothing more can be said of it. */
  get leaseOver(): boolean {
    return this.reason === "LEASE_LOST" || this.reason === "ALREADY_FINALIZED";
  }

  /** Reads the error of a call. */
  static from(error: unknown): RetinueError {
    if (error instanceof RetinueError) return error;
    const from = ConnectError.from(error);
    const info = from.findDetails(ErrorInfoSchema)[0];
    const delay = from.findDetails(RetryInfoSchema)[0]?.retryDelay;
    const fields = from.findDetails(BadRequestSchema).flatMap((request) => request.fieldViolations);
    return new RetinueError(
      from.rawMessage,
      from.code,
      info?.reason,
      info?.metadata,
      fields.map(({ field, description }) => ({ path: field, description })),
      delay && durationMs(delay),
      from.findDetails(ScatterFailureSchema)[0],
    );
  }

  /** Reads how one item of a batch went; undefined if it went well. */
  static fromItem(item: ItemStatus | undefined): RetinueError | undefined {
    return item?.code ? new RetinueError(item.message, item.code, item.reason) : undefined;
  }
}

const PERMANENT = new Set([
  Code.InvalidArgument,
  Code.Unauthenticated,
  Code.PermissionDenied,
  Code.Unimplemented,
  Code.NotFound,
]);
const PASSING = new Set([Code.Unavailable, Code.DeadlineExceeded, Code.Aborted]);
