/** The polling listener, with a handler that appends. Listens from the request `start` until `stop`. */
import { Redis } from 'ioredis';
import pgTransactionalOutbox from 'pg-transactional-outbox';
import { envelopeFields } from '../../../src/streams/envelope.ts';
import { answerParent, childConfig } from '../contender.ts';
import type { PgTransactionalOutboxConfig } from './pg-transactional-outbox.ts';

const { databaseUrl, redisUrl, stream, batch, connections } = childConfig<PgTransactionalOutboxConfig>();
const { getDisabledLogger, initializePollingMessageListener } = pgTransactionalOutbox;
const redis = new Redis(redisUrl);
let shutDown = async (): Promise<void> => {};
const inProgress = new Set<Promise<unknown>>();

function listen(): () => Promise<void> {
  const db = { connectionString: databaseUrl, max: connections };
  const [end] = initializePollingMessageListener(
    {
      outboxOrInbox: 'outbox',
      dbListenerConfig: db,
      dbHandlerConfig: db,
      settings: {
        ...{ dbSchema: 'public', dbTable: 'outbox', nextMessagesFunctionName: 'next_outbox_messages' },
        ...{ nextMessagesBatchSize: batch, nextMessagesPollingIntervalInMs: 250 },
        // As its documentation has it for an outbox.
        ...{ enableMaxAttemptsProtection: false, enablePoisonousMessageProtection: false },
      },
    },
    {
      async handle(message) {
        const payload = message.payload as { tenant_id: string };
        const { id: eventId, messageType: eventType, aggregateType, aggregateId, createdAt = '' } = message;
        const appended = redis.xadd(
          stream,
          '*',
          ...envelopeFields({
            ...{ id: eventId, eventId, eventType, aggregateType, aggregateId, topic: stream, attempts: 0 },
            ...{ occurredAt: createdAt, tenantId: payload.tenant_id, correlationId: null },
            payload: JSON.stringify(payload),
          }),
        );
        inProgress.add(appended);
        await appended.finally(() => inProgress.delete(appended));
      },
    },
    getDisabledLogger(),
  );
  return end;
}

await answerParent(async (request: 'start' | 'stop') => {
  if (request === 'start') shutDown = listen();
  else {
    await shutDown();
    await Promise.allSettled(inProgress);
  }
});
