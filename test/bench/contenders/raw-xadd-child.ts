/** Appends entries in pipelines and checks every reply. Answers `{events}` with `{seconds}`. */
import { randomUUID } from 'node:crypto';
import { Redis } from 'ioredis';
import { envelopeFields } from '../../../src/streams/envelope.ts';
import { answerParent, childConfig } from '../contender.ts';
import type { RawXaddConfig } from './raw-xadd.ts';

const { redisUrl, stream, batch, payload } = childConfig<RawXaddConfig>();
const redis = new Redis(redisUrl);

const anEntry = () => {
  const eventId = randomUUID();
  return envelopeFields({
    ...{ id: '1', eventId, eventType: 'UserCreated', aggregateType: 'user', aggregateId: eventId },
    ...{ topic: stream, payload, occurredAt: '2026-01-01T00:00:00.000000Z', attempts: 0 },
    ...{ tenantId: '11111111-1111-1111-1111-111111111111', correlationId: null },
  });
};

await answerParent(async ({ events }: { events: number }) => {
  const startedAt = performance.now();
  for (let sent = 0; sent < events; sent += batch) {
    const pipeline = redis.pipeline();
    for (let i = sent; i < Math.min(sent + batch, events); i++) pipeline.xadd(stream, '*', ...anEntry());
    for (const [error, id] of (await pipeline.exec()) ?? []) {
      if (error || typeof id !== 'string') throw error ?? new Error('an append has no id');
    }
  }
  return { seconds: (performance.now() - startedAt) / 1_000 };
});
