/** What was found about a requirement: something without which the relay cannot work, or not as well. Imports nothing. */

export type Finding = Readonly<{
  /**
   * - `advice`: it works, but an operator should know
   * - `failed`: the relay cannot work: `relay start` refuses to
   */
  result: 'ok' | 'advice' | 'failed';
  /** One line. Unless it is ok: the cause, and what to do. */
  finding: string;
  /**
   * Whether it may be over although nobody changes configuration, servers or rights: `soon`, as a server that is away
   * or a failover under way, which `relay start` waits for; or `later`, when a step of an operator's is due.
   */
  mayPass: false | 'soon' | 'later';
}>;

/** `subject`: what it is about, in a word or two. */
export type RequirementResult = Finding & Readonly<{ subject: string }>;

export const ok = (finding: string): Finding => ({ result: 'ok', finding, mayPass: false });
export const advice = (finding: string): Finding => ({ result: 'advice', finding, mayPass: false });
export const failed = (finding: string): Finding => ({ result: 'failed', finding, mayPass: false });
export const failedFor = (mayPass: 'soon' | 'later', finding: string): Finding => ({
  ...{ result: 'failed', finding, mayPass },
});

/** One of the list; `On` is what it is tried on. It answers nothing where there is nothing to say. */
export type Requirement<On> = Readonly<{
  subject: string;
  check: (on: On) => Promise<Finding | undefined>;
}>;

/** A requirement has failed and will not pass by itself: the configuration, a server or the table has to be changed. */
export class RequirementError extends Error {
  override readonly name = 'RequirementError';
}

/**
 * Checks one after the other. What comes after a requirement rests on it: the first that fails ends it, and is the one
 * cause that an operator is told.
 *
 * @param findingOf what it means that a check throws
 */
export async function checkInTurn<On>(
  requirements: readonly Requirement<On>[],
  on: On,
  findingOf: (error: unknown) => Finding,
): Promise<RequirementResult[]> {
  const results: RequirementResult[] = [];
  for (const { subject, check } of requirements) {
    const found = await check(on).catch(findingOf);
    if (found !== undefined) results.push({ ...found, subject });
    if (found?.result === 'failed') break;
  }
  return results;
}
