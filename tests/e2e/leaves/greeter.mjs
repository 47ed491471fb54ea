// Serves greeter.proto with the stock Connect library on a socket: node greeter.mjs SOCKET WORD DESCRIPTORS
import { readFileSync } from "node:fs";
import * as http2 from "node:http2";
import { createFileRegistry, fromBinary } from "@bufbuild/protobuf";
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";

const [socket, word, descriptors] = process.argv.slice(2);
const files = createFileRegistry(fromBinary(FileDescriptorSetSchema, readFileSync(descriptors)));

function greet({ name }) {
  if (!name) throw new ConnectError("whom?", Code.InvalidArgument);
  return { greetings: [`${word}, ${name}`] };
}

const routes = (router) => router.service(files.getService("greeter.v1.GreeterService"), { greet });
http2.createServer(connectNodeAdapter({ routes })).listen(socket);
