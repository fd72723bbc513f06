/** Topics of the healthy events; null: the default stream. */
export const TOPICS = [null, 'chaos.orders', 'chaos.invoices'] as const;
/** Of the events that tell when flow has resumed. */
export const PROBE_TOPIC = 'chaos.probe';

const REFUSED = 'chaos.refused.';
/** A key of the wrong type for good: its events end as dead letters. */
export const POISON_TOPIC = `${REFUSED}poison`;
/** Keys that are of the wrong type for a while. */
export const turncoatTopic = (number: number): string => `${REFUSED}turncoat-${number}`;

/** A key that is of the wrong type for so short a time that its events survive it, if their retries keep their distance. */
export const patientTopic = (number: number): string => `chaos.patient-${number}`;

export const REFUSED_TOPICS = [POISON_TOPIC] as const;

/** Whether events of this topic may end as dead letters. */
export const mayDie = (topic: string): boolean => topic.startsWith(REFUSED);
