/** The dashboard as people use it: in a real browser, which a machine without one cannot stand in for. */
import { existsSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Browser, chromium, type Page } from 'playwright-core';
import { expect, onTestFinished, test } from 'vitest';
import { boardUsers, PASSWORD } from '../support/board.ts';
import { anEvent, insertEvents } from '../support/events.ts';
import { setStage } from '../support/flow.ts';
import { waitFor } from '../support/wait.ts';

const CHROMIUM = process.env.RELAY_CHROMIUM_BIN ?? '/usr/bin/chromium';
const ARGS = [
  ...['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run'],
  ...['--disable-background-networking', '--disable-component-update', '--disable-sync'],
];
/** What people look at after the test; nobody needs it for the next. */
const SCREENSHOTS = join(tmpdir(), 'relay-board-screenshots');

async function openBrowser(): Promise<Browser> {
  if (!existsSync(CHROMIUM))
    throw new Error(`There is no Chromium at ${CHROMIUM}: install it, or set RELAY_CHROMIUM_BIN`);
  await mkdir(SCREENSHOTS, { recursive: true });
  const browser = await chromium.launch({ executablePath: CHROMIUM, args: ARGS });
  onTestFinished(() => browser.close());
  return browser;
}

/** A person with a browser window. Gathers all requests, those refused (`401 /login`) and the console's complaints. */
async function person(browser: Browser, url: string) {
  const page = await (await browser.newContext({ viewport: { width: 1280, height: 900 } })).newPage();
  page.setDefaultTimeout(20_000);
  const requests: string[] = [];
  const complaints: string[] = [];
  const refused: string[] = [];
  page.on('request', (request) => requests.push(request.url()));
  page.on('console', (line) => {
    // What was not found is in `refused`, with its address.
    if (line.type() === 'error' && !line.text().startsWith('Failed to load resource'))
      complaints.push(line.text());
  });
  page.on('response', (response) => {
    if (response.status() >= 400) refused.push(`${response.status()} ${new URL(response.url()).pathname}`);
  });
  page.on('pageerror', (error) => complaints.push(error.message));
  // Not every blocked style is said on the console.
  await page.addInitScript(`document.addEventListener('securitypolicyviolation', (event) =>
    console.error('blocked by the policy: ' + event.violatedDirective + ' ' + event.blockedURI))`);
  return {
    page,
    requests,
    complaints,
    refused,
    async logIn(name: string, password = PASSWORD): Promise<void> {
      await page.goto(`${url}/board`);
      await page.getByLabel('Name').fill(name);
      await page.getByLabel('Password').fill(password);
      await page.getByRole('button', { name: 'Log in' }).click();
    },
  };
}

/** Of the job that is shown: icons without names, in the list before its times. */
const jobButtons = (page: Page) =>
  page
    .locator('main')
    .getByRole('list')
    .filter({ hasNot: page.getByText(/all$/) })
    .getByRole('button');

const shot = (page: Page, name: string) => page.screenshot({ path: join(SCREENSHOTS, `${name}.png`) });

/** By their icons, or what is written on them. */
const shownButtons = async (page: Page, selector: string): Promise<string[]> => {
  const found: string[] = [];
  for (const button of await page.locator(selector).all())
    if (await button.isVisible())
      found.push(
        (await button.textContent()) ||
          ((await button.locator('svg').getAttribute('class'))?.split(' ')[1] ?? ''),
      );
  return found;
};

test('an operator sees no button of what is always refused', async () => {
  const browser = await openBrowser();
  const stage = await setStage();
  const pod = await stage.pod({
    ...{ RELAY_BOARD: 'true', RELAY_BOARD_USERS: await boardUsers(), RELAY_MAX_RETRY_ATTEMPTS: '0' },
    RELAY_POLL_INTERVAL: '300', // the tick that is looked at stays
  });
  const failed = anEvent({ topic: 'bull:no' });
  await insertEvents(stage.pool, [failed]);
  await waitFor(async () => (await stage.row(failed.eventId)).dead_lettered_at, { what: 'the dead letter' });
  const { page, logIn } = await person(browser, pod.url);
  await logIn('olga');
  await page.getByText('olga (operator)').waitFor();
  const open = async (path: string, there: string) => {
    await page.goto(`${pod.url}/board${path}`);
    await page.locator(there).first().waitFor({ state: 'attached' });
  };

  await open('/queue/relay-publish?status=failed', 'main li svg.lucide-files');
  expect(await shownButtons(page, 'main li button')).toEqual([
    ...['Retry all', 'Clean all'],
    ...['lucide-refresh-cw', 'lucide-trash2'],
  ]);
  await page.locator('main button[aria-haspopup=menu]').click();
  await page.getByRole('menuitem', { name: 'Pause' }).waitFor();
  expect(await shownButtons(page, '[role=menuitem]')).toEqual(['Retry all 1 failed jobs', 'Pause']);
  await shot(page, '7-menu');

  // The claim queue has its next tick there.
  await open('/queue/relay-claim?status=delayed', 'main li svg.lucide-clock');
  expect(await shownButtons(page, 'main li button')).toEqual([]);
  await page.locator('main a[href*="/relay-claim/repeat"]').click();
  await page.locator('main .lucide-chevron-left').waitFor();
  await page.locator('main li svg.lucide-clock').waitFor({ state: 'attached' });
  expect(await shownButtons(page, 'main li button')).toEqual([]);
  await shot(page, '8-tick');
  await page.locator('header button:has(.lucide-info)').click();
  await page.getByRole('button', { name: 'Close' }).waitFor();
  expect(await shownButtons(page, '[role=dialog] button')).toEqual(['Overview', 'Description', 'Close']);

  await open('/job-schedulers', 'td button');
  expect(await shownButtons(page, 'td button')).toEqual([]);
});

test('an operator logs in, sees both queues, and retries a failed job: its event is in the stream, its row published; a viewer cannot, and no request leaves the host', async () => {
  const browser = await openBrowser();
  const stage = await setStage();
  const pod = await stage.pod({
    ...{ RELAY_BOARD: 'true', RELAY_BOARD_USERS: await boardUsers(), RELAY_MAX_RETRY_ATTEMPTS: '0' },
  });
  const topic = 'dictionary.word.v1';
  await stage.redis.set(topic, 'no stream');
  const event = anEvent({ topic, eventType: 'DictionaryWordAdded', payload: { word: 'Straße' } });
  await insertEvents(stage.pool, [event]);
  const dead = async () => (await stage.row(event.eventId)).dead_lettered_at;
  await waitFor(dead, { what: 'the dead letter' });
  await stage.redis.del(topic);

  const olga = await person(browser, pod.url);
  const startedAt = Date.now();
  await olga.logIn('olga', 'a wrong password');
  await olga.page.getByRole('alert').getByText('Wrong name or password.').waitFor();
  expect(Date.now() - startedAt).toBeGreaterThan(1_000);
  await shot(olga.page, '1-wrong-password');
  expect(olga.refused.splice(0)).toEqual(['401 /login']);
  expect(await olga.page.getByLabel('Name').inputValue()).toBe('olga');
  await olga.logIn('olga');

  const queue = (page: Page, name: string) => page.getByRole('link', { name: new RegExp(name) }).first();
  await queue(olga.page, 'relay-claim').waitFor();
  await queue(olga.page, 'relay-publish').waitFor();
  await olga.page.locator('main').getByText('relay-claim').waitFor();
  await olga.page.getByText('olga (operator)').waitFor();
  await shot(olga.page, '2-overview');
  const failed = `${pod.url}/board/queue/relay-publish?status=failed`;
  await olga.page.goto(failed);
  const title = olga.page.getByText(/DictionaryWordAdded · user:.* · given up after 1 attempt/).first();
  await title.waitFor();
  await olga.page
    .getByText(/^1 dead\. Retry publishes a dead letter\./)
    .first()
    .waitFor();
  await shot(olga.page, '3-failed');
  // All of it is there in a window of 1200 px, and no "attempt #1" beside "after 1 attempt".
  await olga.page.setViewportSize({ width: 1200, height: 900 });
  const isCut = await olga.page.evaluate(`(() => {
    const it = document.querySelector('header h1').parentElement.nextElementSibling;
    return it.scrollHeight > it.clientHeight || it.scrollWidth > it.clientWidth;
  })()`);
  expect(isCut).toBe(false);
  expect(await olga.page.getByText('attempt #1').isVisible()).toBe(false);

  const vera = await person(browser, pod.url);
  await vera.logIn('vera');
  await queue(vera.page, 'relay-publish').waitFor();
  await vera.page.getByText('vera (viewer)').waitFor();
  await vera.page.goto(failed);
  await vera.page
    .getByText(/DictionaryWordAdded/)
    .first()
    .waitFor();
  await vera.page.getByRole('tab', { name: 'Data' }).click();
  await vera.page.getByText('hidden: it may hold personal data').waitFor();
  expect(await vera.page.getByText('Straße').count()).toBe(0);
  expect(await jobButtons(vera.page).count()).toBe(0);
  await vera.page
    .getByText(/^1 dead\. One job per event/)
    .first()
    .waitFor();
  await shot(vera.page, '4-viewer');
  const job = `/board/api/queues/relay-publish/${event.eventId}`;
  await vera.page.evaluate((url) => fetch(url, { method: 'PUT' }), `${job}/retry`);
  expect(vera.refused.splice(0)).toEqual([`403 ${job}/retry`]);

  await olga.page.getByRole('link', { name: event.eventId }).click();
  await olga.page.getByRole('tab', { name: 'Data' }).click();
  await olga.page.getByText('Straße').waitFor();
  await shot(olga.page, '5-job');
  const retry = jobButtons(olga.page).first();
  await retry.hover();
  await olga.page.getByText('Retry', { exact: true }).waitFor();
  await retry.click();
  await olga.page.getByRole('button', { name: 'Confirm' }).click();
  await waitFor(async () => (await stage.row(event.eventId)).published, { what: 'the row to be published' });
  expect(await stage.row(event.eventId)).toMatchObject({ dead_lettered_at: null });
  expect((await stage.entries(topic)).map(({ fields }) => fields.event_id)).toEqual([event.eventId]);
  await olga.page.goto(failed);
  await olga.page.getByRole('link', { name: 'FAILED', exact: true }).waitFor();
  await shot(olga.page, '6-published');

  for (const { requests, complaints, refused } of [olga, vera]) {
    expect(requests.length).toBeGreaterThan(10);
    expect(requests.filter((it) => !it.startsWith(pod.url) && !it.startsWith('data:'))).toEqual([]);
    expect(complaints).toEqual([]);
    // The page asks once more for the job that is done and gone.
    expect(refused.filter((it) => it !== `404 ${job}`)).toEqual([]);
  }
});
