// Files of a bundle, kept in the browser by their SHA-256, so that a reload downloads nothing twice.
//
// IndexedDB, because it is there on plain http too; Cache Storage and OPFS exist in secure contexts alone.
// Every file is checked on arrival against the SHA-256 that the server names. Over plain http that name comes on
// the same wire as the file, so it finds damage, not an attacker.

import { Sha256 } from "./sha256.js";

const NAME = "edgedisp";
const FILES = "files"; // SHA-256 -> Blob

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function database() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(FILES);
  return done(request);
}

/** Run one request on the store of files. */
async function withFiles(mode, act) {
  const opened = await database();
  try {
    const transaction = opened.transaction(FILES, mode);
    const ended = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
    ended.catch(() => {}); // it is awaited below, unless the request fails first
    const result = await done(act(transaction.objectStore(FILES)));
    await ended;
    return result;
  } finally {
    opened.close();
  }
}

/** SHA-256 of the files that are kept. */
export async function kept() {
  try {
    return new Set(await withFiles("readonly", (files) => files.getAllKeys()));
  } catch {
    return new Set(); // no storage in this browser or mode: nothing is kept
  }
}

/** Forget every file. */
export async function forget() {
  await withFiles("readwrite", (files) => files.clear());
}

async function blobOf(sha256) {
  try {
    return await withFiles("readonly", (files) => files.get(sha256));
  } catch {
    return undefined;
  }
}

/**
 * Make sure that a file {url, size_bytes, sha256} is here.
 *
 * Resolves to {read, downloaded, kept}: `read` gives its bytes (Uint8Array) from where they are kept. Throws
 * an Error for people where it cannot be had. `progress(bytes)` counts while it arrives.
 */
export async function fetched(file, progress) {
  const own = await blobOf(file.sha256);
  if (own?.size === file.size_bytes) return { read: () => fromStore(file.sha256), downloaded: false, kept: true };
  const blob = await download(file, progress);
  try {
    await withFiles("readwrite", (files) => files.put(blob, file.sha256));
    return { read: () => fromStore(file.sha256), downloaded: true, kept: true };
  } catch {
    // No room, or no storage at all: it is used from memory and gone with the page.
    return { read: async () => new Uint8Array(await blob.arrayBuffer()), downloaded: true, kept: false };
  }
}

async function fromStore(sha256) {
  const blob = await blobOf(sha256);
  if (!blob) throw new Error("The browser has removed a file that it kept. Reload the page.");
  return new Uint8Array(await blob.arrayBuffer());
}

async function download(file, progress) {
  let answer;
  try {
    answer = await fetch(file.url, { cache: "no-store" });
  } catch {
    throw new Error("The computer cannot be reached. Is edgedisp phone still running, on the same network?");
  }
  if (!answer.ok) throw new Error(`The computer answered ${answer.status} for ${file.url}.`);
  const hash = new Sha256();
  const pieces = [];
  const reader = answer.body.getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      hash.update(part.value);
      pieces.push(part.value);
      progress(hash.length);
    }
  } catch {
    throw new Error("The download broke off. Try again.");
  }
  if (hash.length !== file.size_bytes || hash.hex() !== file.sha256) {
    throw new Error(`${file.url} arrived damaged. Try again.`);
  }
  return new Blob(pieces);
}
