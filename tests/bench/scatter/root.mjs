// A root on Node: `node root.mjs ADDRESS...` asks every address for the bytes that came, joins what came back. Nothing is parsed.
import { createRequire } from "node:module";

const require = createRequire(`${process.env.BENCH_NODE_MODULES}/`);
const grpc = require("@grpc/grpc-js");

const LEAF = "/retinue.scattergather.v1.LeafService/Query";
const SCATTER = "/retinue.scattergather.v1.ScatterGatherService/Scatter";
const TIMEOUT_MS = 9500;
const asIs = (bytes) => bytes;

const clients = process.argv.slice(2).map(
  (address) => new grpc.Client(address, grpc.credentials.createInsecure(), { "grpc.use_local_subchannel_pool": 1 }),
);

const ask = (client, data, options) =>
  new Promise((resolve, reject) => {
    client.makeUnaryRequest(LEAF, asIs, asIs, data, new grpc.Metadata(), options, (error, reply) =>
      error ? reject(error) : resolve(reply),
    );
  });

const scatter = ({ request }, done) => {
  const options = { deadline: Date.now() + TIMEOUT_MS };
  Promise.all(clients.map((client) => ask(client, request, options))).then(
    (replies) => done(null, Buffer.concat(replies)),
    (error) => done(error),
  );
};

const connected = clients.map(
  (client) =>
    new Promise((resolve, reject) => client.waitForReady(Date.now() + 30_000, (error) => (error ? reject(error) : resolve()))),
);
const server = new grpc.Server();
server.addService(
  {
    Scatter: {
      path: SCATTER,
      requestStream: false,
      responseStream: false,
      requestSerialize: asIs,
      requestDeserialize: asIs,
      responseSerialize: asIs,
      responseDeserialize: asIs,
    },
  },
  { Scatter: scatter },
);
await Promise.all(connected);
server.bindAsync("127.0.0.1:0", grpc.ServerCredentials.createInsecure(), (error, port) => {
  if (error) throw error;
  console.log(JSON.stringify({ listen: [`127.0.0.1:${port}`] }));
});
