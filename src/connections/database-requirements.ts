import type { RelayConfig } from '../config/config.ts';
import { lacks, missingFromTable } from '../outbox/required.ts';
import { hasWakeup } from '../outbox/wakeup.ts';
import { errorText } from '../telemetry/logger.ts';
import { advice, type Finding, failed, failedFor, ok, type Requirement } from '../verdict.ts';
import type { Pool } from './database.ts';

/** What the relay needs of PostgreSQL, of the table and of its role there. */

export type OnDatabase = Readonly<{ pool: Pool; config: RelayConfig }>;

export const DATABASE_REQUIREMENTS: readonly Requirement<OnDatabase>[] = [
  { subject: 'database', check: connects },
  { subject: 'table', check: hasTable },
  { subject: 'wake-up', check: hasTrigger },
];

/**
 * SQLSTATEs of what passes: connections (08), transactions that collide (40), no resources (53), states of objects (55),
 * an operator's intervention (57). Without one, nobody has answered.
 */
const PASSES = /^(08|40|53|55|57)/;

export function databaseFinding(error: unknown): Finding {
  const { code = '08' } = error as { code?: string };
  const isAnswer = /^[0-9A-Z]{5}$/.test(code);
  return isAnswer && !PASSES.test(code) ? failed(errorText(error)) : failedFor('soon', errorText(error));
}

async function connects({ pool }: OnDatabase): Promise<Finding> {
  const { rows } = await pool.query(
    `SELECT current_setting('server_version') AS version, current_user AS role`,
  );
  return ok(`PostgreSQL ${rows[0].version}, as role ${rows[0].role}`);
}

async function hasTable({ pool }: OnDatabase): Promise<Finding> {
  const missing = await missingFromTable(pool);
  if (missing.length > 0) return failedFor('later', lacks(missing));
  return ok('identity.outbox has its columns and indexes');
}

async function hasTrigger({ pool, config }: OnDatabase): Promise<Finding | undefined> {
  if (!config.notify) return undefined;
  if (await hasWakeup(pool)) return ok('the trigger is there');
  const seconds = config.pollIntervalMs / 1_000;
  return advice(`no trigger: new events wait up to ${seconds} s ("relay migrate" adds it)`);
}
