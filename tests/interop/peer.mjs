// A js-libp2p peer for the interoperability tests. It reads commands from stdin and writes only answers to stdout, one
// JSON object per line.
//
//   node peer.mjs [--listen ADDR]... [--relay-server] [--security tls|noise|both] [--echo PROTOCOL] [--chunk BYTES]
//
// Writes {"event":"ready","peer_id","addresses"} when it listens, then answers each {"id","do",...} with {"id","ok"} or
// {"id","error"}:
//
//   dial {address}                            opens a new connection, even if there is one
//                                             -> {peer_id, address, limited, security, muxer}
//   ping {peer_id}                            -> {rtt_ms}
//   identify {peer_id}                        -> {agent, protocol_version, protocols, listen_addresses,
//                                                 observed_address}
//   reserve {address}                         makes a reservation on the relay there -> {addresses}
//   echo {peer_id | address, protocol, bytes} sends, and compares the returned bytes -> {bytes, seconds}
//   stop                                      -> {}
//
// If a peer has several connections, the one dialed last is used, or else the newest.

import { createInterface } from 'node:readline'
import { parseArgs } from 'node:util'
import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { identify } from '@libp2p/identify'
import { noise } from '@libp2p/noise'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { tls } from '@libp2p/tls'
import { webSockets } from '@libp2p/websockets'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { WebSocket } from 'ws'

// js-libp2p expects the globals of Node 22. These two are the only ones that Node 20 lacks.
globalThis.WebSocket ??= WebSocket
Promise.withResolvers ??= () => {
  const all = {}
  all.promise = new Promise((resolve, reject) => Object.assign(all, { resolve, reject }))
  return all
}

const PATIENCE = 30_000 // ms, for everything except an echo
const ECHO_PATIENCE = 300_000 // ms
const MIB = 1024 * 1024

const { values: args } = parseArgs({
  options: {
    listen: { type: 'string', multiple: true, default: [] },
    'relay-server': { type: 'boolean', default: false },
    security: { type: 'string', default: 'both' }, // both: TLS is offered first
    echo: { type: 'string' },
    // Bytes per write to a stream. js-libp2p makes one yamux frame of them, up to the other side's window, and yamux in
    // Rust closes the connection at a frame of more than 1 MiB.
    chunk: { type: 'string', default: '65536' }
  }
})
const chunk = Number(args.chunk)
const security = { tls: [tls()], noise: [noise()], both: [tls(), noise()] }[args.security]
if (security == null || !(chunk > 0)) throw new Error('--security is tls, noise or both, and --chunk a number of bytes')

const print = (line) => process.stdout.write(`${JSON.stringify(line)}\n`)
const complain = (what, error) => process.stderr.write(`${what}: ${error?.stack ?? describe(error)}\n`)
process.stdout.on('error', () => process.exit(1)) // the test has ended

/** Returns an error as one line, with its causes, and without the stacks that some have in their text. */
function describe (error) {
  const inner = [...(error?.errors ?? []), error?.cause].filter((e) => e != null).map(describe)
  const text = error instanceof Error ? `${error.name}: ${error.message}` : String(error)
  return [text.replace(/\s*\n\s*(at .*)?/g, ' ').trim(), ...inner].join('; ')
}

const node = await createLibp2p({
  addresses: { listen: args.listen },
  transports: [tcp(), webSockets(), circuitRelayTransport({ reservationCompletionTimeout: PATIENCE })],
  connectionEncrypters: security,
  // A paused stream that receives more than its buffer holds is reset. The default buffer is a quarter of the largest
  // window, so that a peer within its window could still be reset.
  streamMuxers: [yamux({ streamOptions: { maxReadBufferLength: 16 * MIB } })],
  connectionGater: { denyDialMultiaddr: () => false }, // allows loopback and private addresses
  // All peers of a test have the same address. The default limit is 5 connections a second from an address.
  connectionManager: { dialTimeout: PATIENCE, addressDialTimeout: PATIENCE, inboundConnectionThreshold: 1000 },
  // js-libp2p pings all the time. On a busy machine a late answer says nothing about the other side.
  connectionMonitor: { abortConnectionOnPingFailure: false },
  services: {
    // The default, one stream at a time, would refuse Weft's stream while the automatic one on each new connection is
    // open.
    identify: identify({ maxInboundStreams: 8, maxOutboundStreams: 8 }),
    ping: ping(),
    ...(args['relay-server'] && {
      // The data limit is for both directions together. The duration is in ms here, and in seconds for clients.
      relay: circuitRelayServer({
        reservations: { defaultDataLimit: BigInt(1024 * MIB), defaultDurationLimit: 15 * 60_000 }
      })
    })
  }
})

/** Waits for one of these events. p-event, which js-libp2p uses, leaves a listener on the signal each time. */
function happens (stream, names, signal) {
  return new Promise((resolve) => {
    const done = () => {
      for (const name of names) stream.removeEventListener(name, done)
      signal.removeEventListener('abort', done)
      resolve()
    }
    for (const name of names) stream.addEventListener(name, done)
    signal.addEventListener('abort', done)
    if (signal.aborted) done()
  })
}

function check (stream, signal) {
  signal.throwIfAborted()
  if (['aborted', 'reset'].includes(stream.status)) throw new Error(`the stream was ${stream.status}`)
}

/** Waits until a stream accepts more bytes. Its own `onDrain` waits only the first time. */
async function drained (stream, signal) {
  while (stream.writableNeedsDrain && stream.writeStatus !== 'closed') await happens(stream, ['drain', 'close'], signal)
  check(stream, signal)
}

/**
 * Yields the bytes of a stream until the other side closes its half. The stream's own iterator ends then too, but
 * without the unread bytes of a paused stream.
 */
async function * incoming (stream, signal) {
  const queue = []
  const take = (event) => queue.push(event.data)
  stream.addEventListener('message', take)
  try {
    while (true) {
      while (queue.length > 0) yield queue.shift().subarray() // flat: many arrive in pieces
      check(stream, signal)
      if (stream.readableEnded) return
      await happens(stream, ['message', 'end', 'close'], signal)
    }
  } finally {
    stream.removeEventListener('message', take)
  }
}

/** Sends back all bytes, then closes. Reads no faster than the other side reads. */
async function serveEcho (stream) {
  try {
    const signal = AbortSignal.timeout(ECHO_PATIENCE)
    for await (const data of incoming(stream, signal)) {
      for (let at = 0; at < data.byteLength; at += chunk) {
        stream.send(data.subarray(at, at + chunk))
        if (stream.writableNeedsDrain && stream.readStatus === 'readable') stream.pause()
        await drained(stream, signal)
      }
      if (stream.readStatus === 'paused') stream.resume()
    }
    await stream.close({ signal })
  } catch (error) {
    complain('echo', error)
    stream.abort(error)
  }
}

// The bytes that an echo sends: blocks of noise, each different, so that none can be mistaken for another.
const NOISE = new Uint32Array(16_384)
for (let i = 0, x = 0x9e3779b9; i < NOISE.length; i++) {
  x ^= x << 13
  x ^= x >>> 17
  x ^= x << 5
  NOISE[i] = x
}

const blocks = new Map() // the last few

function block (index) {
  if (!blocks.has(index)) {
    const mix = Math.imul(index + 1, 0x85ebca6b)
    blocks.set(index, Buffer.from(NOISE.map((word) => word ^ mix).buffer))
    if (blocks.size > 8) blocks.delete(blocks.keys().next().value)
  }
  return blocks.get(index)
}

function pattern (offset, length) {
  const bytes = Buffer.allocUnsafe(length)
  for (let done = 0; done < length;) {
    const at = offset + done
    done += block(Math.floor(at / NOISE.byteLength)).copy(bytes, done, at % NOISE.byteLength)
  }
  return bytes
}

/** Runs `use` on a new stream, which is closed afterwards. Limited connections are allowed. */
async function withStream (connection, protocol, signal, use) {
  const stream = await connection.newStream(protocol, { signal, runOnLimitedConnection: true })
  try {
    return await use(stream)
  } catch (error) {
    stream.abort(error)
    throw error
  }
}

const dialed = new Map()

async function dial (address) {
  // Without force, an existing connection over another transport would be returned.
  const connection = await node.dial(multiaddr(address), { force: true, signal: AbortSignal.timeout(PATIENCE) })
  dialed.set(connection.remotePeer.toString(), connection)
  return connection
}

function connected (peer) {
  const open = node.getConnections().filter((c) => c.status === 'open' && c.remotePeer.toString() === peer)
  const newest = () => open.sort((a, b) => b.timeline.open - a.timeline.open)[0]
  const connection = open.find((c) => c === dialed.get(peer)) ?? newest()
  if (connection == null) throw new Error(`no connection to ${peer}`)
  return connection
}

const commands = {
  async dial ({ address }) {
    const c = await dial(address)
    return {
      peer_id: `${c.remotePeer}`,
      address: `${c.remoteAddr}`,
      limited: c.limits != null,
      security: c.encryption,
      muxer: c.multiplexer
    }
  },

  // Pings by hand, because js-libp2p's service does not use limited connections: it dials.
  async ping ({ peer_id: peer }) {
    const signal = AbortSignal.timeout(PATIENCE)
    return withStream(connected(peer), '/ipfs/ping/1.0.0', signal, async (stream) => {
      const sent = pattern(Math.floor(Math.random() * 2 ** 32), 32)
      const start = performance.now()
      stream.send(sent)
      await stream.close({ signal })
      let back = Buffer.alloc(0)
      for await (const data of incoming(stream, signal)) {
        back = Buffer.concat([back, data])
        if (back.length >= sent.length) break
      }
      if (!back.equals(sent)) throw new Error(`sent 32 bytes, and ${back.length} others came back`)
      return { rtt_ms: performance.now() - start }
    })
  },

  async identify ({ peer_id: peer }) {
    const told = await node.services.identify.identify(connected(peer), { signal: AbortSignal.timeout(PATIENCE) })
    return {
      agent: told.agentVersion ?? null,
      protocol_version: told.protocolVersion ?? null,
      protocols: told.protocols,
      listen_addresses: told.listenAddrs.map(String),
      observed_address: told.observedAddr?.toString() ?? null
    }
  },

  async reserve ({ address }) {
    const relay = address.split('/p2p/').at(-1).split('/')[0]
    // There is no public way to listen on one more address. This waits for the reservation, with a time limit.
    await node.components.transportManager.listen([multiaddr(address.replace(/(\/p2p-circuit)?$/, '/p2p-circuit'))])
    const addresses = node.getMultiaddrs().map(String).filter((own) => own.includes(`/p2p/${relay}/p2p-circuit`))
    if (addresses.length === 0) throw new Error(`no reservation at ${relay}`)
    return { addresses }
  },

  async echo ({ peer_id: peer, address, protocol, bytes }) {
    const connection = address == null ? connected(peer) : await dial(address)
    const signal = AbortSignal.timeout(ECHO_PATIENCE)
    const start = performance.now()
    return withStream(connection, protocol, signal, async (stream) => {
      const send = async () => {
        for (let at = 0; at < bytes; at += chunk) {
          stream.send(pattern(at, Math.min(chunk, bytes - at)))
          await drained(stream, signal)
        }
        await stream.close({ signal })
      }
      const receive = async () => {
        let at = 0
        for await (const data of incoming(stream, signal)) {
          if (at + data.byteLength > bytes) throw new Error(`more than ${bytes} bytes came back`)
          if (!pattern(at, data.byteLength).equals(data)) throw new Error(`other bytes came back, from ${at} on`)
          at += data.byteLength
        }
        if (at < bytes) throw new Error(`${at} of ${bytes} bytes came back`)
      }
      await Promise.all([send(), receive()])
      return { bytes, seconds: (performance.now() - start) / 1000 }
    })
  },

  async stop () {
    return {}
  }
}

let stopping

async function stop () {
  setTimeout(() => process.exit(0), 5_000) // a clean close is not required
  await (stopping ??= node.stop()).catch((error) => complain('stop', error))
  process.exit(0)
}

async function answer (line) {
  let id = null
  try {
    const command = JSON.parse(line)
    id = command.id ?? null
    if (!Object.hasOwn(commands, command.do)) throw new Error(`no command ${command.do}`)
    print({ id, ok: await commands[command.do](command) })
    if (command.do === 'stop') await stop()
  } catch (error) {
    print({ id, error: describe(error) })
  }
}

// From here on an error is an answer, or else only logged.
process.on('unhandledRejection', (error) => complain('unhandled rejection', error))
process.on('uncaughtException', (error) => complain('uncaught exception', error))

if (args.echo != null) await node.handle(args.echo, serveEcho, { runOnLimitedConnection: true })
print({ event: 'ready', peer_id: node.peerId.toString(), addresses: node.getMultiaddrs().map(String) })
createInterface({ input: process.stdin }).on('line', answer).on('close', stop)
