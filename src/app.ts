/** The library's entry: createRelay(config, deps?) -> { start, stop, … }, and what its users need besides. */
export { type BoardQueues, type BoardQueuesFrom, createBoardQueues } from './board-queues.ts';
export { ConfigError, loadConfig, type RelayConfig } from './config.ts';
export { type Logger, serializeError } from './logger.ts';
export type { Pool } from './outbox/database.ts';
export { appendEvent, type NewEvent, type Transaction } from './outbox/producer.ts';
export { createRelay, type Relay, type RelayDeps } from './relay.ts';
