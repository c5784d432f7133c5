// A small broker on Node's `ws`, as a competent developer would write it: the same JSON protocol
// (docs/protocol.md), rooms in a Map, one JSON.stringify per publish, the same buffer to every member.

import { createServer } from "node:http";
import { WebSocket, WebSocketServer } from "ws";

const rooms = new Map(); // room -> Set of sockets
let sessions = 0;

const reply = (socket, message) => socket.send(JSON.stringify([message]));

function join(socket, message) {
  let members = rooms.get(message.room);
  if (members === undefined) rooms.set(message.room, (members = new Set()));
  members.add(socket);
  socket.rooms.add(message.room);
  reply(socket, { op: "ok", id: message.id, room: message.room });
}

function leave(socket, room) {
  const members = rooms.get(room);
  members?.delete(socket);
  if (members?.size === 0) rooms.delete(room);
  socket.rooms.delete(room);
}

function publish(socket, message) {
  const members = rooms.get(message.room);
  if (members !== undefined) {
    const event = { op: "event", room: message.room, event: message.event, data: message.data, ts: Date.now() / 1000 };
    const frame = Buffer.from(JSON.stringify([event]));
    for (const member of members) {
      if (member.readyState === WebSocket.OPEN) member.send(frame, { binary: false });
    }
  }
  if (message.id !== undefined) reply(socket, { op: "ok", id: message.id });
}

function receive(socket, data) {
  let message;
  try {
    message = JSON.parse(data);
  } catch {
    reply(socket, { op: "error", code: "bad_message", message: "not JSON", retry: false });
    return;
  }
  switch (message.op) {
    case "publish":
      return publish(socket, message);
    case "join":
      return join(socket, message);
    case "leave":
      leave(socket, message.room);
      return reply(socket, { op: "ok", id: message.id });
    case "ping":
      return reply(socket, { op: "ok", id: message.id, ts: Date.now() / 1000 });
    default:
      return reply(socket, { op: "error", id: message.id, code: "unknown_op", message: "unknown op", retry: false });
  }
}

const server = createServer((request, response) => response.writeHead(426).end());
const sockets = new WebSocketServer({ server, path: "/ws", perMessageDeflate: false, maxPayload: 64 * 1024 });

// Broken connections are found as `ws` documents it, every 25 s like the broker and Socket.IO do,
// some of the sockets every tenth of a second so that it makes no spike.
const HEARTBEAT = 250; // tenths of a second
const turns = Array.from({ length: HEARTBEAT }, () => new Set());
let turn = 0;
setInterval(() => {
  turn = (turn + 1) % HEARTBEAT;
  for (const socket of turns[turn]) {
    if (!socket.alive) {
      socket.terminate();
      continue;
    }
    socket.alive = false;
    socket.ping();
  }
}, 100);

sockets.on("connection", (socket) => {
  socket.rooms = new Set();
  socket.alive = true;
  const mine = turns[sessions % HEARTBEAT];
  mine.add(socket);
  socket.on("pong", () => (socket.alive = true));
  socket.on("close", () => mine.delete(socket));
  socket.on("message", (data) => receive(socket, data));
  socket.on("close", () => socket.rooms.forEach((room) => leave(socket, room)));
  socket.on("error", () => socket.terminate());
  reply(socket, { op: "welcome", protocol: 1, session: `s${++sessions}`, user: null, node: "ws", server: "ws", ping: 25 });
});

server.listen({ port: 0, host: "127.0.0.1", backlog: 4096 }, () => {
  console.log(`ready ws://127.0.0.1:${server.address().port}/ws`);
});
process.on("SIGTERM", () => process.exit(0));
