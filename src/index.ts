/** The library's entry: createRelay(config, deps?) -> { start, stop, … }, and what its users need besides. */

export { ConfigError, loadConfig, type RelayConfig } from './config/config.ts';
export type { Pool } from './connections/database.ts';
export { type BoardQueues, type BoardQueuesFrom, createBoardQueues } from './http/own-board.ts';
export { appendEvent, type NewEvent, type Transaction } from './outbox/producer.ts';
export { createRelay, type Relay, type RelayDeps } from './relay.ts';
export { type Logger, serializeError } from './telemetry/logger.ts';
