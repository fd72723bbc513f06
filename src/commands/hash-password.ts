import { createInterface } from 'node:readline/promises';
import { Writable } from 'node:stream';
import { text as readAll } from 'node:stream/consumers';
import { type Command, InvalidArgumentError, Option } from 'commander';
import { entryOf, ROLES, type Role, USER_NAME } from '../config/board-users.ts';
import { counted } from '../event.ts';
import { hashPassword } from '../http/passwords.ts';
import { answerTo } from './act.ts';
import { EXIT, fail } from './command.ts';
import { print, text } from './terminal.ts';

const MIN_CHARACTERS = 12;
const MAX_CHARACTERS = 1_000;

export function add(command: Command): void {
  command
    .argument('<name>', `name of the user: ${USER_NAME.expected}`, userName)
    .addOption(
      new Option('--role <role>', 'viewer: may look; operator: may act; one of them is needed').choices(
        ROLES,
      ),
    )
    .addHelpText(
      'after',
      `\nAsks for the password in a terminal, and reads it from stdin elsewhere:\n${MIN_CHARACTERS} to ${MAX_CHARACTERS} characters. Prints the entry for RELAY_BOARD_USERS.`,
    )
    .action(async (name: string, { role }: { role?: Role }) => {
      try {
        if (role === undefined)
          throw new Error(
            `what may ${name} do? Say --role viewer (look), or --role operator (replay, discard, retry and pause as well)`,
          );
        const password = process.stdin.isTTY
          ? await ask()
          : (await readAll(process.stdin)).replace(/\r?\n$/, '');
        assertGood(password);
        print(text`${entryOf({ name, role, hash: await hashPassword(password) })}`);
        process.exitCode = EXIT.done;
      } catch (error) {
        fail(error);
      }
    });
}

function assertGood(password: string): void {
  const { length } = [...password];
  if (length < MIN_CHARACTERS || length > MAX_CHARACTERS)
    throw new Error(
      `the password has ${counted(length, 'character')}; ${MIN_CHARACTERS} to ${MAX_CHARACTERS} are needed`,
    );
  if (/[\p{Cc}]/u.test(password)) throw new Error('the password has control characters, or several lines');
}

function userName(name: string): string {
  if (USER_NAME.pattern.test(name)) return name;
  throw new InvalidArgumentError(`Expected ${USER_NAME.expected}.`);
}

/** Twice, since nobody sees what is typed. The prompts go to stderr: stdout is for the entry alone. */
async function ask(): Promise<string> {
  const unseen = new Writable({ write: (_chunk, _encoding, done) => done() });
  const terminal = createInterface({ input: process.stdin, output: unseen, terminal: true });
  const question = async (prompt: string): Promise<string> => {
    process.stderr.write(prompt);
    const answer = await answerTo(terminal, '');
    process.stderr.write('\n');
    if (answer === null) throw new Error('no password was given');
    return answer;
  };
  try {
    const password = await question(`Password (at least ${MIN_CHARACTERS} characters): `);
    assertGood(password); // before it has to be typed again
    if ((await question('Again: ')) !== password) throw new Error('the two are not the same');
    return password;
  } finally {
    terminal.close();
  }
}
