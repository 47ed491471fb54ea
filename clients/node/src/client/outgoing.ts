/** The requests of a stream: what is pushed comes out, in order, until it is closed. */
export class Outgoing<T> implements AsyncIterable<T> {
  readonly #ready: T[] = [];
  #closed = false;
  #wake = () => {};

  push(request: T): void {
    if (!this.#closed) this.#ready.push(request);
    this.#wake();
  }

  close(): void {
    this.#closed = true;
    this.#wake();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<T> {
    for (;;) {
      for (let next = this.#ready.shift(); next; next = this.#ready.shift()) yield next;
      if (this.#closed) return;
      await new Promise<void>((resolve) => (this.#wake = resolve));
    }
  }
}
