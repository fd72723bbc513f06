import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { folderOfFile } from './servers.ts';

/**
 * NODE_OPTIONS of a pod in which `code` runs in place of each command's sending to Redis. It has `command`, and `send()`.
 * The client's class is in the bundle, where nobody can import it: the first of its instances that takes a listener tells it.
 */
export async function redisHook(name: string, code: string): Promise<string> {
  const file = join(await folderOfFile(), `${name}.mjs`);
  await writeFile(
    file,
    `import { EventEmitter } from 'node:events';
import { existsSync } from 'node:fs';
const { on } = EventEmitter.prototype;
EventEmitter.prototype.on = function (...args) {
  if (typeof this.sendCommand === 'function') {
    EventEmitter.prototype.on = on;
    const client = Object.getPrototypeOf(this);
    const { sendCommand } = client;
    client.sendCommand = function (command, stream) {
      const send = () => sendCommand.call(this, command, stream);
      ${code}
    };
  }
  return on.apply(this, args);
};
`,
  );
  return `--import=${file}`;
}
