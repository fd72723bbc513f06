/** The pages for logging in and out, and for refusals. No scripts, nothing from other hosts. */

const STYLE = `
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
  body { margin: 0; min-height: 100vh; display: grid; place-items: center; background: Canvas; color: CanvasText; }
  main { width: min(22rem, 90vw); }
  h1 { font-size: 1.25rem; font-weight: 600; }
  label, button { display: block; margin-top: 1rem; }
  input, button { box-sizing: border-box; width: 100%; padding: .6rem; font: inherit; border: 1px solid GrayText; border-radius: .3rem; }
  button { background: #1f5fbf; border-color: #1f5fbf; color: #fff; cursor: pointer; }
  [role=alert] { border-left: .25rem solid #c62828; padding-left: .75rem; }`;

const page = (title: string, body: string): string => `<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<link rel="icon" href="data:,">
<title>${title}</title>
<style>${STYLE}
</style>
</head>
<body><main>
<h1>${title}</h1>
${body}
</main></body>
</html>
`;

const escaped = (text: string): string => text.replaceAll(/[&<>"']/g, (it) => `&#${it.charCodeAt(0)};`);

/**
 * @param next path to open after the log-in; must be one of our own
 * @param failed the last try: why it failed, and the name, so that only the password must be typed again
 */
export const logInPage = (
  action: string,
  next: string,
  failed?: Readonly<{ problem: string; name: string }>,
): string =>
  page(
    'Relay: log in',
    `${failed === undefined ? '' : `<p role="alert">${escaped(failed.problem)}</p>`}
<form method="post" action="${escaped(action)}">
<input type="hidden" name="next" value="${escaped(next)}">
<label>Name <input name="name" value="${escaped(failed?.name ?? '')}" autocomplete="username" autocapitalize="none" required${failed ? '' : ' autofocus'}></label>
<label>Password <input name="password" type="password" autocomplete="current-password" required${failed ? ' autofocus' : ''}></label>
<button type="submit">Log in</button>
</form>`,
  );

export const logOutPage = (action: string, back: string, operator: { name: string; role: string }): string =>
  page(
    'Relay: log out',
    `<p>You are ${escaped(operator.name)}, ${escaped(operator.role)}. <a href="${escaped(back)}">Back to the dashboard</a></p>
<form method="post" action="${escaped(action)}"><button type="submit">Log out</button></form>`,
  );

export const refusalPage = (reason: string): string =>
  page('Relay: refused', `<p role="alert">${escaped(reason)}</p>`);
