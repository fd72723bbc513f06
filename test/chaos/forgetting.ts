/** How a PostgreSQL comes to have fewer rows than it had. What it forgets is written down: nothing is promised of it. */
import { execFile } from 'node:child_process';
import { chown, rename, rm, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { pause, persistently } from './patience.ts';
import type { World } from './world.ts';

/** What the standby never got, at least. */
export const LAG_MS = 1_500;

/**
 * Takes a base backup, lets the primary go on for a while, ends it, and promotes the backup in its place: same address,
 * same system identifier, another timeline.
 */
export async function promoteLaggingStandby(world: World): Promise<void> {
  const { postgres, postgresFolder, sql, workload, forgotten } = world;
  const data = join(postgresFolder, 'data');
  const standby = join(postgresFolder, 'standby');
  const gone = join(postgresFolder, 'gone');
  await Promise.all([standby, gone].map((folder) => rm(folder, { recursive: true, force: true })));
  await persistently(() => backUp(world, data, standby));
  await pause(LAG_MS);
  await postgres.kill('SIGQUIT');
  const sent = [...workload.attempted()];
  await rename(data, gone);
  await rename(standby, data);
  await postgres.restart();
  await sql('SELECT CASE WHEN pg_is_in_recovery() THEN pg_promote() END');
  const rows = await sql<{ event_id: string }>('SELECT event_id::text FROM identity.outbox');
  const present = new Set(rows.map((row) => row.event_id));
  for (const eventId of sent) if (!present.has(eventId)) forgotten.add(eventId);
  await rm(gone, { recursive: true, force: true });
}

async function backUp({ admin }: World, data: string, copy: string): Promise<void> {
  const { uid, gid } = await stat(data);
  const put = async (name: string, content: string): Promise<void> => {
    await writeFile(join(copy, name), content);
    await chown(join(copy, name), uid, gid);
  };
  const session = await admin.connect();
  try {
    await session.query(`SELECT pg_backup_start('standby', true)`);
    await copyLive(data, copy);
    const { rows } = await session.query<{ labelfile: string }>(
      'SELECT labelfile FROM pg_backup_stop(false)',
    );
    // All that was written until the end of the backup.
    await copyLive(`${join(data, 'pg_wal')}/.`, join(copy, 'pg_wal'));
    await put('backup_label', rows[0]?.labelfile ?? '');
    await put('standby.signal', '');
    await rm(join(copy, 'postmaster.pid'), { force: true });
  } finally {
    session.release(true);
  }
}

/** With owners and modes. Files that vanish meanwhile are none of the copy's. */
async function copyLive(from: string, to: string): Promise<void> {
  await promisify(execFile)('cp', ['-a', from, to]).catch((error: Error & { stderr?: string }) => {
    const lines = (error.stderr ?? '').split('\n').filter((line) => line !== '');
    if (lines.length === 0 || !lines.every((line) => line.includes('No such file'))) throw error;
  });
}

/** Empties the table in one transaction, and gives ids from 1 again. */
export async function truncate({ admin, forgotten }: World): Promise<void> {
  await persistently(async () => {
    const session = await admin.connect();
    try {
      await session.query(`BEGIN; SET LOCAL lock_timeout = '20s'; LOCK TABLE identity.outbox`);
      const { rows } = await session.query<{ event_id: string }>(
        'SELECT event_id::text FROM identity.outbox',
      );
      await session.query('TRUNCATE identity.outbox RESTART IDENTITY');
      for (const { event_id } of rows) forgotten.add(event_id);
      await session.query('COMMIT');
    } finally {
      session.release(true);
    }
  });
}
