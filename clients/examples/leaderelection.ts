// An election from end to end; prints clients/transcripts/leaderelection.txt. Give an election of your own to run it twice.
// In clients/node, with RETINUE_CONTROL_ADDRESS set to the server's control socket:
// npm ci && npm run build && node dist/examples/leaderelection.js
import { once } from "node:events";
import { setTimeout as sleep } from "node:timers/promises";
import { connect, createClient, Election, RetinueError, TermLost, type Client, type Term } from "retinue/client";
import { EndReason, type Leader } from "retinue/leaderelection/v1/election_pb";
import { LeaderElectionService } from "retinue/leaderelection/v1/leaderelection_service_pb";

type Elections = Client<typeof LeaderElectionService>;

const APP_LEASE_MS = 2000;

async function main(electionId: string): Promise<void> {
  const elections = createClient(LeaderElectionService, connect("leaderelection"));
  const operator = createClient(LeaderElectionService, connect("control"));
  console.log(`before the first term: ${await leader(elections, electionId)}`);
  await refuse(elections, electionId);
  const first = await candidate(elections, electionId, "first").campaign();
  console.log(`first is elected: ${first.isLeader()}, its token is above 0: ${first.token.value > 0n}`);
  const elected = await standBy(elections, electionId);
  await keep(first);
  await proclaim(elections, electionId, first);
  const second = await handOver(elections, electionId, first, elected);
  await stepDown(elections, operator, electionId, second);
  await remember(elections, electionId);
}

function candidate(client: Elections, electionId: string, candidateId: string, standsBy = (_?: Leader) => {}): Election {
  return new Election({
    client,
    electionId,
    candidateId,
    appLeaseMs: APP_LEASE_MS,
    listener: (event) => event.kind === "standby" && standsBy(event.leader),
  });
}

async function refuse(elections: Elections, electionId: string): Promise<void> {
  const appLeaseDuration = { seconds: 3600n };
  const refusal = await refused(elections.tryAcquire({ electionId: "no spaces, please", appLeaseDuration }));
  console.log(`stood with nonsense: ${told(refusal)}`);
  for (const path of refusal.fields.map((field) => field.path).sort()) console.log(`  ${path}`);
  const unknown = await refused(elections.verifyToken({ electionId, token: { domain: "nowhere", value: 1n } }));
  console.log(`verified a token before the first term: ${told(unknown)}`);
}

/** Has another candidate wait; what comes later is its term. */
async function standBy(elections: Elections, electionId: string): Promise<{ term: Promise<Term> }> {
  let tell = (_?: Leader) => {};
  const leader = new Promise<Leader | undefined>((resolve) => (tell = resolve));
  const term = candidate(elections, electionId, "second", (leader) => tell(leader)).campaign();
  console.log(`second stands by: ${(await leader)?.candidateId} leads`);
  const answer = await elections.tryAcquire({ electionId, candidateId: "third" });
  console.log(`third tried: acquired ${answer.acquired}, ${answer.leader?.candidateId} leads`);
  return { term };
}

/** Waits for longer than the app's lease: heartbeats go on by themselves. */
async function keep(term: Term): Promise<void> {
  await sleep(3 * APP_LEASE_MS);
  console.log(
    `three leases later first still leads: ${term.isLeader()}, its work goes on: ${!term.signal.aborted}`,
  );
}

async function proclaim(elections: Elections, electionId: string, term: Term): Promise<void> {
  const observing = new AbortController();
  const seen = elections.observe({ electionId }, { signal: observing.signal })[Symbol.asyncIterator]();
  console.log(`an observer sees: ${shown((await seen.next()).value?.leader)}`);
  await term.proclaim("10.0.0.1:8080");
  console.log(`first proclaims, the observer sees: ${shown((await seen.next()).value?.leader)}`);
  observing.abort();
  const verified = await elections.verifyToken({ electionId, token: term.token });
  console.log(`first's token is verified: ${shown(verified.leader)}`);
}

async function handOver(
  elections: Elections,
  electionId: string,
  first: Term,
  elected: { term: Promise<Term> },
): Promise<Term> {
  console.log(`first resigns: released ${await first.resign()}, it leads: ${first.isLeader()}`);
  const second = await elected.term;
  const [higher, same] = [second.token.value > first.token.value, second.token.domain === first.token.domain];
  console.log(`second is elected: a higher token: ${higher}, the same domain: ${same}`);
  console.log(`first's token is refused: ${told(await refused(elections.verifyToken({ electionId, token: first.token })))}`);
  console.log(`first proclaims under it: ${told(await refused(first.proclaim("too late")))}`);
  return second;
}

async function stepDown(elections: Elections, operator: Elections, electionId: string, second: Term): Promise<void> {
  const request = { electionId, token: second.token };
  console.log(`an app asks second to step down: ${told(await refused(elections.requestStepDown(request)))}`);
  const stopped = once(second.signal, "abort");
  console.log(`an operator asks second to step down: ${(await operator.requestStepDown(request)).requested}`);
  await stopped;
  const lost = second.signal.reason as TermLost;
  console.log(`second must stop its work: ${lost.reason}, it still leads: ${second.isLeader()}`);
  console.log(`second resigns: released ${await second.resign()}`);
}

async function remember(elections: Elections, electionId: string): Promise<void> {
  console.log(`after the last term: ${await leader(elections, electionId)}`);
  for (const { candidateId, endReason } of (await elections.listTerms({ electionId })).terms) {
    console.log(`a term of ${candidateId} ended: ${EndReason[endReason]}`);
  }
}

async function leader(elections: Elections, electionId: string): Promise<string> {
  return shown((await elections.getLeader({ electionId })).leader);
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

function shown(leader: Leader | undefined): string {
  if (!leader?.candidateId) return "nobody leads";
  return `${leader.candidateId} leads${leader.value && ` at ${leader.value}`}`;
}

await main(process.argv[2] ?? "transcript");
