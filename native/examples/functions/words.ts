// SPDX-License-Identifier: Apache-2.0
// How often each word comes in the payload, the most frequent first: lines of a number and a word.
//
// The same in AssemblyScript (assemblyscript.org), to show that an enclave's functions may be in any language that
// has WebAssembly: what a function needs of its host are three imports of WASI, and they are all here.
//
//     npm install assemblyscript
//     npx asc words.ts -o words.wasm -O --exportStart _start --use abort=words/abort

@external("wasi_snapshot_preview1", "fd_read")
declare function fd_read(fd: u32, pieces: usize, count: u32, done: usize): u32;
@external("wasi_snapshot_preview1", "fd_write")
declare function fd_write(fd: u32, pieces: usize, count: u32, done: usize): u32;
@external("wasi_snapshot_preview1", "proc_exit")
declare function proc_exit(code: u32): void;

const PIECE: i32 = 65536;

// A piece of memory as WASI wants it told (address and length), and behind it how much was done.
const piece = memory.data(12);

function fail(why: string): void {
  write(2, String.UTF8.encode(why + "\n"));
  proc_exit(1);
}

// What AssemblyScript calls when an assertion fails or memory is short.
export function abort(message: string | null, file: string | null, line: u32, column: u32): void {
  fail(message === null ? "aborted" : message);
  unreachable();
}

function write(fd: u32, data: ArrayBuffer): void {
  let at = changetype<usize>(data);
  let left = data.byteLength;
  while (left > 0) {
    store<usize>(piece, at, 0);
    store<u32>(piece, left, 4);
    if (fd_write(fd, piece, 1, piece + 8) != 0) proc_exit(1);
    const done = load<u32>(piece, 8);
    at += done;
    left -= done;
  }
}

function read(): Uint8Array {
  let input = new Uint8Array(PIECE);
  let length = 0;
  while (true) {
    if (input.length - length < PIECE) {
      const larger = new Uint8Array(2 * input.length);
      larger.set(input.subarray(0, length));
      input = larger;
    }
    store<usize>(piece, input.dataStart + length, 0);
    store<u32>(piece, PIECE, 4);
    if (fd_read(0, piece, 1, piece + 8) != 0) fail("the payload cannot be read");
    const done = load<u32>(piece, 8);
    if (done == 0) return input.subarray(0, length);
    length += done;
  }
}

// Letters and digits of ASCII, in lower case; 0: none of a word.
function letter(byte: u8): u8 {
  if (byte >= 0x41 && byte <= 0x5a) return byte | 0x20;
  return (byte >= 0x61 && byte <= 0x7a) || (byte >= 0x30 && byte <= 0x39) ? byte : 0;
}

class Word {
  constructor(
    public text: string,
    public count: u32,
  ) {}
}

const input = read();
const counts = new Map<string, Word>();
for (let at = 0; at < input.length; at++) {
  const begin = at;
  while (at < input.length && letter(input[at]) != 0) {
    input[at] = letter(input[at]);
    at++;
  }
  if (at == begin) continue;
  const text = String.UTF8.decodeUnsafe(input.dataStart + begin, at - begin);
  if (counts.has(text)) counts.get(text).count++;
  else counts.set(text, new Word(text, 1));
}
const words = counts.values();
words.sort((a, b) => {
  if (a.count != b.count) return a.count > b.count ? -1 : 1;
  return a.text < b.text ? -1 : a.text > b.text ? 1 : 0;
});
const lines = new Array<string>(words.length);
for (let i = 0; i < words.length; i++) lines[i] = words[i].count.toString() + " " + words[i].text + "\n";
write(1, String.UTF8.encode(lines.join("")));
