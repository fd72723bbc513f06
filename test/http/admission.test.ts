import { expect, test } from 'vitest';
import { BusyError, createLimiter, createPace, shareAnswers } from '../../src/http/admission.ts';
import { deferred } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

test('who asks the same while it is answered, and soon after, gets the same answer; a failure is asked anew', async () => {
  let asked = 0;
  const { promise, resolve } = deferred();
  const share = shareAnswers(500, async (question) => {
    asked++;
    if (question === 'bad') throw new Error('no');
    await promise;
    return `${question} ${asked}`;
  });
  const all = [share('a'), share('a'), share('b')];
  resolve();
  expect(await Promise.all(all)).toEqual(['a 2', 'a 2', 'b 2']);
  expect(await share('a')).toBe('a 2');
  await waitFor(async () => (await share('a')) === 'a 3', { what: 'a new answer' });
  for (let i = 0; i < 2; i++) await expect(share('bad')).rejects.toThrow('no');
  expect(asked).toBe(5);
});

test('a limiter lets few through at a time, in turn, keeps some waiting, and goes on after a failure', async () => {
  const limit = createLimiter({ atOnce: 2, waiting: 3 });
  const works = Array.from({ length: 5 }, () => deferred<string>());
  const begun: number[] = [];
  const results = works.map(({ promise }, i) =>
    limit(() => {
      begun.push(i);
      return promise;
    }),
  );
  await expect(limit(async () => 'never')).rejects.toThrow(BusyError);
  expect(begun).toEqual([0, 1]);
  const failed = expect(results[0]).rejects.toThrow('broken');
  works[0]?.reject(new Error('broken'));
  await failed;
  await waitFor(() => begun.length === 3, { what: 'the third to begin' });
  for (const { resolve } of works.slice(1)) resolve('done');
  expect(await Promise.all(results.slice(1))).toEqual(['done', 'done', 'done', 'done']);
  expect(begun).toEqual([0, 1, 2, 3, 4]);
  expect(await limit(async () => 'again')).toBe('again');
});

test('a slot of a limiter rests as many times as long as its work took, whether it succeeded or not', async () => {
  const limit = createLimiter({ atOnce: 1, waiting: 1, rest: 4 });
  const took: number[] = [];
  let endedAt = Number.NaN;
  const work = async () => {
    const beganAt = performance.now();
    if (took.length > 0) expect(beganAt - endedAt).toBeGreaterThan(3.9 * (took.at(-1) as number));
    await new Promise((resolve) => setTimeout(resolve, 20));
    endedAt = performance.now();
    took.push(endedAt - beganAt);
    if (took.length === 2) throw new Error('broken');
  };
  await limit(work);
  await expect(limit(work)).rejects.toThrow('broken');
  await limit(work);
  expect(took).toHaveLength(3);
});

test('a pace lets a burst through, slows down what comes after, and refuses when too many wait', async () => {
  const pace = createPace({ perSecond: 100, burst: 10, waiting: 20 });
  const startedAt = performance.now();
  const all = await Promise.allSettled(Array.from({ length: 50 }, pace));
  const passed = all.filter(({ status }) => status === 'fulfilled');
  expect(passed).toHaveLength(30);
  // 20 of them at 100 a second.
  expect(performance.now() - startedAt).toBeGreaterThan(150);
  expect((all.at(-1) as PromiseRejectedResult).reason).toBeInstanceOf(BusyError);
});
