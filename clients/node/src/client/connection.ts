import * as net from "node:net";
import type { Transport } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

/** Where a server with all patterns listens. */
export const DEFAULT_ADDRESS = "127.0.0.1:7070";

/**
 * Finds the server of one pattern, such as "workqueue": RETINUE_WORKQUEUE_ADDRESS, then RETINUE_ADDRESS, then
 * DEFAULT_ADDRESS. It is HOST:PORT, unix:PATH, or the absolute path of a socket.
 */
export function address(pattern: string): string {
  const { env } = process;
  const found = env[`RETINUE_${pattern.toUpperCase()}_ADDRESS`] || env["RETINUE_ADDRESS"] || DEFAULT_ADDRESS;
  return found.startsWith("/") ? `unix:${found}` : found;
}

/**
 * A gRPC transport to the server of one pattern, for createClient(). It is in plaintext: apps dial localhost, and the relay
 * there holds the credentials for what is farther away. It connects on first use, again after a break, and does not keep
 * the process alive.
 */
export function connect(pattern: string): Transport {
  const found = address(pattern);
  const path = socketPath(found);
  if (path === undefined) return createGrpcTransport({ baseUrl: `http://${found}` });
  return createGrpcTransport({
    baseUrl: "http://localhost",
    nodeOptions: { createConnection: () => net.connect(path) },
  });
}

/** The path of unix:PATH, or of a path that is absolute; undefined of HOST:PORT. */
export function socketPath(address: string): string | undefined {
  if (address.startsWith("/")) return address;
  return address.startsWith("unix:") ? address.slice("unix:".length).replace(/^\/\/(?=\/)/, "") : undefined;
}
