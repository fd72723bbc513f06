/** Preloaded into a pod (`NODE_OPTIONS=--import=…`): its clock is off by CHAOS_CLOCK_OFFSET_MS. */
const offsetMs = Number(process.env.CHAOS_CLOCK_OFFSET_MS ?? 0);
const RealDate = Date;

globalThis.Date = class extends RealDate {
  constructor(...args) {
    if (args.length === 0) super(RealDate.now() + offsetMs);
    else super(...args);
  }

  static now() {
    return RealDate.now() + offsetMs;
  }
};
