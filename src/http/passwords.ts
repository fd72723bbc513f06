import { randomBytes, scrypt, timingSafeEqual } from 'node:crypto';
import { PASSWORD_HASH } from '../config/board-users.ts';

/** 32 MiB and about 80 ms of one core for each guess, on a thread of its own: the event loop stays free. */
const COST = { logN: 15, r: 8, p: 1 };
const SALT_BYTES = 16;
const KEY_BYTES = 32;
/** Log-ins that are computed at once. Of the four threads that DNS and files need too, some stay free. */
const AT_ONCE = 2;

type Cost = typeof COST;

/** The hash of a password, in the form of PASSWORD_HASH. */
export async function hashPassword(password: string, cost: Cost = COST): Promise<string> {
  const salt = randomBytes(SALT_BYTES);
  const key = await derive(password, salt, cost);
  const { logN, r, p } = cost;
  return `scrypt.${logN}.${r}.${p}.${salt.toString('base64url')}.${key.toString('base64url')}`;
}

/** Compared with it, every password is wrong, and as slow as any: for names that nobody has. */
export const NOBODYS_HASH = `scrypt.${COST.logN}.${COST.r}.${COST.p}.${'A'.repeat(22)}.${'A'.repeat(43)}`;

/** Whether `hash` is that of `password`. */
export async function isPassword(password: string, hash: string): Promise<boolean> {
  const [, logN, r, p, salt = '', key = ''] = PASSWORD_HASH.exec(hash) ?? [];
  const cost = { logN: Number(logN), r: Number(r), p: Number(p) };
  const derived = await derive(password, Buffer.from(salt, 'base64url'), cost);
  return timingSafeEqual(derived, Buffer.from(key, 'base64url'));
}

let running = 0;
const waiting: (() => void)[] = [];

async function derive(password: string, salt: Buffer, { logN, r, p }: Cost): Promise<Buffer> {
  // Typed on one machine and checked on another: the same letters, however they are composed.
  const text = password.normalize('NFC');
  const N = 2 ** logN;
  while (running >= AT_ONCE) await new Promise<void>((resolve) => waiting.push(resolve));
  running++;
  try {
    return await new Promise<Buffer>((resolve, reject) => {
      scrypt(text, salt, KEY_BYTES, { N, r, p, maxmem: 256 * N * r }, (error, key) =>
        error ? reject(error) : resolve(key),
      );
    });
  } finally {
    running--;
    waiting.shift()?.();
  }
}
