import pg from 'pg';
import { pgOptions } from '../config/connection-urls.ts';
import { nextStatementFails } from './session.ts';

/**
 * A pool of connections to `databaseUrl`, with the TLS that the URL asks for. `options` win over the URL.
 *
 * @throws {UrlError} if the URL cannot be read, or a TLS file that it points to.
 */
export function createPool(databaseUrl: string, options: pg.PoolConfig = {}): pg.Pool {
  const { preferTls, ...fromUrl } = pgOptions(databaseUrl);
  const pool = new pg.Pool({ ...fromUrl, ...(preferTls && { Client: PreferTlsClient }), ...options });
  // Where the server ends a connection while the pool hands it out, the connection emits `error` before its user listens.
  // Without this listener that would end the process; with it, the next statement fails.
  pool.on('connect', (client) => client.on('error', nextStatementFails));
  return pool;
}

/** One connection, otherwise like `createPool`. */
export function createClient(databaseUrl: string, options: pg.ClientConfig = {}): pg.Client {
  const { preferTls, ...fromUrl } = pgOptions(databaseUrl);
  const merged = { ...fromUrl, ...options };
  return preferTls ? new PreferTlsClient(merged) : new pg.Client(merged);
}

/** The parts of node-postgres' Connection that its type declarations leave out (8.23, `lib/connection.js`). */
type Internals = {
  connect(port: number | string, host?: string): void;
  attachListeners(stream: unknown): void;
  emit(event: 'sslconnect'): boolean;
};

/** The server's answer to "TLS?": one byte, S or N. */
const NO_TLS = 'N'.charCodeAt(0);

/** Asks for TLS like any connection with `ssl`, and goes on without it where node-postgres gives up. */
class PreferTlsConnection extends pg.Connection {
  connect(port: number | string, host?: string): void {
    const base = pg.Connection.prototype as unknown as Internals;
    const self = this as unknown as Internals;
    base.connect.call(this, port, host);
    const plain = this.stream;
    const [whenAnswered] = plain.listeners('data');
    if (whenAnswered === undefined) throw new Error('node-postgres no longer waits for the answer about TLS');
    plain.removeListener('data', whenAnswered as () => void);
    plain.once('data', (answer: Buffer) => {
      if (answer.length !== 1 || answer[0] !== NO_TLS) {
        whenAnswered.call(plain, answer);
        return;
      }
      self.attachListeners(plain);
      // "The channel is as secure as it gets: log in." Nothing else listens for it.
      self.emit('sslconnect');
    });
  }
}

/**
 * A client that speaks TLS if the server offers it and plain text if not, as libpq and asyncpg do by default
 * (`sslmode=prefer`); node-postgres knows only yes and no. Like them, it verifies no certificate:
 * who needs that asks for sslmode=verify-full.
 */
class PreferTlsClient extends pg.Client {
  constructor(config: pg.ClientConfig = {}) {
    const ssl = { rejectUnauthorized: false };
    const { keepAlive = false, keepAliveInitialDelayMillis = 0 } = config;
    const connection = new PreferTlsConnection({ ssl, keepAlive, keepAliveInitialDelayMillis });
    // pg-pool hides the password from being copied along.
    const { password } = config;
    super({ ...config, ...(password !== undefined && { password }), ssl, connection } as pg.ClientConfig);
  }
}
