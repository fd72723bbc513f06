import { randomBytes, scrypt, timingSafeEqual } from 'node:crypto';
import { PASSWORD_HASH } from '../config/board-users.ts';
import { createLimiter } from './admission.ts';

/** Each hash takes 32 MiB and about 80 ms of one core, on libuv's thread pool. */
const COST = { logN: 15, r: 8, p: 1 };
const SALT_BYTES = 16;
const KEY_BYTES = 32;
/**
 * Two hashes are computed at once: DNS and files need the other two threads of libuv's pool. Ten more wait, for half a
 * second at most.
 */
const limit = createLimiter({ atOnce: 2, waiting: 10 });

type Cost = typeof COST;

/** The hash of a password, in the form of PASSWORD_HASH. */
export async function hashPassword(password: string, cost: Cost = COST): Promise<string> {
  const salt = randomBytes(SALT_BYTES);
  const key = await derive(password, salt, cost);
  const { logN, r, p } = cost;
  return `scrypt.${logN}.${r}.${p}.${salt.toString('base64url')}.${key.toString('base64url')}`;
}

/** For unknown names: no password matches, and comparing takes as long as for a known name. */
export const NOBODYS_HASH = `scrypt.${COST.logN}.${COST.r}.${COST.p}.${'A'.repeat(22)}.${'A'.repeat(43)}`;

/**
 * Whether `hash` is that of `password`.
 * @throws {BusyError} when too many log-ins wait
 */
export async function isPassword(password: string, hash: string): Promise<boolean> {
  const [, logN, r, p, salt = '', key = ''] = PASSWORD_HASH.exec(hash) ?? [];
  const cost = { logN: Number(logN), r: Number(r), p: Number(p) };
  const derived = await derive(password, Buffer.from(salt, 'base64url'), cost);
  return timingSafeEqual(derived, Buffer.from(key, 'base64url'));
}

function derive(password: string, salt: Buffer, { logN, r, p }: Cost): Promise<Buffer> {
  // Keyboards differ in how they compose letters: normalised, they are the same bytes.
  const text = password.normalize('NFC');
  const N = 2 ** logN;
  return limit(
    () =>
      new Promise<Buffer>((resolve, reject) => {
        scrypt(text, salt, KEY_BYTES, { N, r, p, maxmem: 256 * N * r }, (error, key) =>
          error ? reject(error) : resolve(key),
        );
      }),
  );
}
