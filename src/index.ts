/** The library's entry: createRelay(config, deps?) -> { start, stop, … }, and what its users need besides. */

export type { PgPool, RedisClient } from './clients.ts';
export type { RelayConfig } from './config/config.ts';
export { ConfigError, loadConfig } from './config/load-config.ts';

export { type BoardQueues, type BoardQueuesFrom, createBoardQueues } from './http/own-board.ts';
export {
  appendEvent,
  type DrizzleTransaction,
  type NewEvent,
  type PgTransaction,
  type Transaction,
} from './outbox/producer.ts';
export { createRelay, type Relay, type RelayDeps } from './relay.ts';
export { type Logger, serializeError } from './telemetry/logger.ts';
