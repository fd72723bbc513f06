import { once } from 'node:events';
import { type AddressInfo, createServer } from 'node:net';
import { expect, onTestFinished, test } from 'vitest';
import { waitForServers } from '../../src/connections/wait-for-servers.ts';
import { openPool, silent } from '../support/stages.ts';

async function mutePort(): Promise<number> {
  const mute = createServer(() => {}).listen(0, '127.0.0.1');
  onTestFinished(() => void mute.close());
  await once(mute, 'listening');
  return (mute.address() as AddressInfo).port;
}

test.each([
  ['refuses the connection', async () => 9, /^connect ECONNREFUSED [^\n]+$/],
  ['is mute', mutePort, /^no answer yet$/],
])('who waits for a server that %s is told so after a second, without a stack', async (_, port, reason) => {
  const startedAt = Date.now();
  const told: { after: number; about: unknown }[] = [];
  const warn = (about: unknown) => told.push({ after: Date.now() - startedAt, about });
  const waiting = waitForServers({
    pool: openPool(`postgres://relay@127.0.0.1:${await port()}/none`, { connectionTimeoutMillis: 1_500 }),
    ...{ redis: [], timeoutMs: 2_000, logger: { ...silent, warn } as typeof silent },
  });
  await expect(waiting).rejects.toThrow(/^PostgreSQL cannot be reached/);
  expect(told.map(({ about }) => about)).toEqual([
    { server: 'PostgreSQL', reason: expect.stringMatching(reason) },
  ]);
  expect(told[0]?.after).toBeGreaterThan(900);
  expect(told[0]?.after).toBeLessThan(1_900);
});
